"""What a config must satisfy before anything is read: rules between its keys."""

import math
from typing import Any

from ftjax.errors import UserError
from ftjax.optimizers import settings
from ftjax.ranges import check_ranges

WHOLE_BATCH = ("kto", "aot", "aot_unpaired")  # losses
COMPARING = ("dpo", "orpo", "kto", "cpo", "simpo", "reward")  # tasks


def validate(config: Any) -> None:
    """Checks every value against its range, then the rules between keys.

    Raises:
      UserError: names the key, what it may be and what it is.
    """
    check_ranges(config)
    _contradictions(config)
    _check_stream(config)
    _check_init(config)
    _check_loss(config)
    _check_parallel(config)
    _check_optimizer(config)
    if "rollout" in config:
        _check_rollouts(config)


def _contradictions(config: Any) -> None:
    train, optim = config.train, config.optim
    quantized = config.quant.format != "none"
    if quantized and config.method.name == "full":
        raise UserError(
            "a quantized base cannot be trained: its codes have no gradient",
            where="config.method.name, config.quant.format",
            expected="method=qlora, or quant.format=none",
            got=f"method=full, format={config.quant.format}",
        )
    if quantized and config.model.from_scratch:
        raise UserError(
            "there are no weights to quantize",
            where="config.model.from_scratch, config.quant.format",
            expected="a model with weights, or quant.format=none",
        )
    if train.steps is not None and train.epochs is not None:
        raise UserError(
            "the length of the run is given twice",
            where="config.train.steps, config.train.epochs",
            expected="one of the two",
            got=f"steps={train.steps}, epochs={train.epochs}",
        )
    if train.batch_size % train.accumulate:
        k = train.accumulate
        near = max(train.batch_size // k, 1) * k
        raise UserError(
            "the batch cannot be cut into equal micro-batches",
            where="config.train.batch_size, config.train.accumulate",
            expected="batch_size divisible by accumulate",
            got=f"{train.batch_size} / {train.accumulate}",
            fix=f"batch_size={near} or {near + k}",
        )
    if train.steps is not None and optim.warmup >= train.steps:
        raise _long_warmup(optim.warmup, train.steps)


def _check_stream(config: Any) -> None:
    """A stream has no length of its own, and the learning rate wants to know one."""
    if config.data.stream and config.train.steps is None:
        epochs = config.train.epochs
        raise UserError(
            "nobody knows how long a stream is",
            where="config.train.steps",
            expected="the most steps to take; a stream is read once",
            got="none" if epochs is None else f"train.epochs={epochs}",
            fix="--config.train.steps=1000",
        )


def _check_init(config: Any) -> None:
    """What an update that is made of the weights asks of the rest."""
    method = config.method
    init, key = method.get("init"), "config.method.init"
    if init == "loftq" and config.quant.format == "none":
        raise UserError(
            "LoftQ begins with the error of a quantization, and there is none",
            where=f"{key}, config.quant.format",
            expected="method=qlora, or quant.format=nf4, fp4, int8 or int4",
            got="quant.format=none",
            fix="--config.method.init=kaiming leaves the base as it is",
        )
    if init != "loftq" and method.get("loftq_iters", 1) != 1:
        raise UserError(
            "turns of LoftQ, which was not asked for",
            where=f"{key}, config.method.loftq_iters",
            expected="init=loftq, or loftq_iters=1",
            got=f"init={init}, loftq_iters={method.loftq_iters}",
        )
    taken = init in ("pissa", "olora")
    if method.get("use_dora") and (taken or method.get("loftq_iters", 1) > 1):
        raise UserError(
            "DoRA's magnitudes are those of the base, which would be taken apart",
            where=f"{key}, config.method.use_dora",
            expected="use_dora=False, or an init that leaves the base alone",
            got=f"init={init}, use_dora=True",
        )
    if not taken:
        return
    if config.model.from_scratch:
        raise UserError(
            "there are no weights to begin with",
            where=f"config.model.from_scratch, {key}",
            expected="a model with weights, or init=kaiming",
            got=f"init={init}",
        )
    if method.dropout > 0:
        raise UserError(
            "dropout would drop a part of the base, which begins in the update",
            where=f"{key}, config.method.dropout",
            expected=f"dropout=0 with {init}",
            got=f"dropout={method.dropout}",
            fix="--config.method.dropout=0",
        )


def _check_loss(config: Any) -> None:
    if config.task in COMPARING and not config.data.completion_only:
        raise UserError(
            "answers are compared, and prompts are not: both sides have the same one",
            where="config.task, config.data.completion_only",
            expected="completion_only=True",
            got=f"task={config.task}, completion_only=False",
            fix="leave it as it is; ORPO imitates prompts by loss.nll_scope",
        )
    loss = config.loss
    if config.task in COMPARING and loss.get("beta", 1.0) <= 0:
        raise UserError(
            "a value outside its range",
            where="config.loss.beta",
            expected="a positive number: with 0 no preference has a gradient",
            got=repr(loss.beta),
        )
    if config.task == "kto" and not loss.desirable_weight + loss.undesirable_weight:
        raise UserError(
            "nothing is learned of answers that weigh nothing",
            where="config.loss.desirable_weight, config.loss.undesirable_weight",
            expected="at least one of them above 0",
            got="0, 0",
        )
    if config.task == "distill" and loss.nll_weight > 1:
        raise UserError(
            "the likelihood has a share of the loss of distillation",
            where="config.loss.nll_weight",
            expected="between 0 and 1",
            got=repr(loss.nll_weight),
        )
    middle = loss.get("divergence") == "js_divergence" and config.task == "distill"
    if middle and not 0 < loss.beta < 1:
        raise UserError(
            "the Jensen-Shannon divergence is 0 where its middle is one of its ends",
            where="config.loss.divergence, config.loss.beta",
            expected="beta above 0 and below 1; or forward_kl, reverse_kl",
            got=f"divergence=js_divergence, beta={loss.beta}",
        )


def _check_parallel(config: Any) -> None:
    if config.parallel != "pmap":
        return
    if config.mesh.fsdp != 1:
        raise UserError(
            "pmap keeps all weights on every device, fsdp a part of them on each",
            where="config.parallel, config.mesh.fsdp",
            expected="fsdp=1, or parallel=jit",
            got=f"parallel=pmap, fsdp={config.mesh.fsdp}",
            fix="--config.parallel=jit",
        )
    if "rollout" in config or config.data.get("stream"):
        raise UserError(
            "pmap trains on rows that are stored: not on rollouts, not on a stream",
            where="config.parallel",
            expected="parallel=jit",
            got="parallel=pmap",
            fix="--config.parallel=jit",
        )
    types = str(config.loss.get("type", "")).split(",")
    if whole := [name.strip() for name in types if name.strip() in WHOLE_BATCH]:
        raise UserError(
            "this loss looks at all rows at once, and pmap shows a device its own",
            where="config.parallel, config.loss.type",
            expected="parallel=jit",
            got=f"parallel=pmap, type={', '.join(whole)}",
            fix="--config.parallel=jit",
        )


def _check_optimizer(config: Any) -> None:
    optim = config.optim
    if strangers := settings.unused(optim):
        raise UserError(
            "this optimizer does not have these settings",
            where=", ".join(f"config.optim.{key}" for key in strangers),
            expected=", ".join(["-1 (as usual)", *settings.USUAL[optim.name]]),
            got=f"name={optim.name}, "
            + ", ".join(f"{key}={optim[key]}" for key in strangers),
            fix=" ".join(f"--config.optim.{key}=-1" for key in strangers),
        )
    if optim.name == "schedule_free" and optim.schedule != "constant":
        raise UserError(
            "schedule_free averages its weights at a constant rate",
            where="config.optim.name, config.optim.schedule",
            expected="schedule=constant, with or without a warm-up",
            got=f"schedule={optim.schedule}",
            fix="--config.optim.schedule=constant",
        )
    if optim.name == "schedule_free" and config.method.get("dtype") == "bfloat16":
        raise UserError(
            "schedule_free moves its average in steps that bfloat16 rounds away",
            where="config.optim.name, config.method.dtype",
            expected="method.dtype=float32, or another optimizer",
            got="method.dtype=bfloat16",
        )
    if optim.b_lr_ratio != 1 and config.method.name != "lora":
        raise UserError(
            "there is no `b` whose learning rate could differ",
            where="config.method.name, config.optim.b_lr_ratio",
            expected="b_lr_ratio=1, or method=lora or qlora",
            got=f"method={config.method.name}, b_lr_ratio={optim.b_lr_ratio}",
        )


def _check_rollouts(config: Any) -> None:
    """Rollouts are whole groups, and a run stops between them only."""
    train, rollout = config.train, config.rollout
    size, unit = train.batch_size * rollout.batches, rollout_steps(config)
    if config.task == "grpo" and rollout.group < 2:
        raise UserError(
            "an answer is compared with the others of its group, and there are none",
            where="config.rollout.group",
            expected="2 or more",
            got=str(rollout.group),
            fix="--config.rollout.group=8; PPO learns from single answers",
        )
    if size % rollout.group:
        near = -(-train.batch_size // rollout.group) * rollout.group
        raise UserError(
            "a rollout is not made of whole groups",
            where="config.train.batch_size, config.rollout.group",
            expected="batch_size * rollout.batches divisible by rollout.group",
            got=f"{size} completions in groups of {rollout.group}",
            fix=f"--config.train.batch_size={near}",
        )
    for name in ("steps", "save_every", "eval_every"):
        if (train[name] or 0) % unit:
            near = -(-train[name] // unit) * unit
            raise UserError(
                "a run is saved between rollouts only: half of one cannot continue",
                where=f"config.train.{name}, config.rollout",
                expected=f"a multiple of batches * passes = {unit}",
                got=str(train[name]),
                fix=f"--config.train.{name}={near}",
            )


def rollout_steps(config: Any) -> int:
    """Optimizer steps that live on one rollout; 1 where there are no rollouts."""
    rollout = config.get("rollout")
    return rollout.batches * rollout.passes if rollout else 1


def prompt_room(max_length: int, new: int) -> int:
    """The tokens that a prompt may have beside its answer.

    Raises:
      UserError: there are none left.
    """
    if max_length > new:
        return max_length - new
    raise UserError(
        "an answer leaves no room for a prompt",
        where="config.rollout.max_new_tokens, config.data.max_length",
        expected=f"fewer new tokens than the {max_length} of a row",
        got=str(new),
        fix=f"--config.rollout.max_new_tokens={max(max_length // 2, 1)}",
    )


def _long_warmup(warmup: int, steps: int) -> UserError:
    return UserError(
        "the warm-up is as long as the run",
        where="config.optim.warmup",
        expected=f"fewer than the {steps} steps of the run",
        got=str(warmup),
        fix=f"--config.optim.warmup={steps // 10}",
    )


def total_steps(config: Any, rows_per_epoch: int) -> int:
    """Optimizer steps of the run: `train.steps`, or `train.epochs` (1 if neither).

    An epoch that ends within a rollout goes on to its end.
    """
    if config.train.steps is not None:
        return config.train.steps
    epochs = 1.0 if config.train.epochs is None else config.train.epochs
    steps = math.ceil(epochs * rows_per_epoch / config.train.batch_size)
    steps = -(-steps // rollout_steps(config)) * rollout_steps(config)
    if config.optim.warmup >= steps > 0 and config.optim.warmup > 0:
        raise _long_warmup(config.optim.warmup, steps)
    return max(rollout_steps(config), steps)


def check_devices(config: Any, devices: int) -> None:
    """A micro-batch must spread evenly over the devices of the mesh."""
    rows = config.train.batch_size // config.train.accumulate
    if rows % devices:
        near = max(1, rows // devices) * devices
        raise UserError(
            "a micro-batch does not spread evenly over the devices",
            where="config.train.batch_size, config.train.accumulate",
            expected=f"rows per micro-batch divisible by {devices} devices",
            got=f"{config.train.batch_size} / {config.train.accumulate} = {rows} rows",
            fix=f"--config.train.batch_size={near * config.train.accumulate}",
        )


USUAL_LENGTH = 1024


def data_settings(config: Any, max_positions: int) -> Any:
    """`config.data` with what it leaves open filled in: `eval` and `max_length`.

    `eval=auto` is the held-out part of what ships with ftjax where that is trained on,
    and nothing where the user's own data is.

    Raises:
      UserError: rows would be longer than the model's positions.
    """
    check_positions(config, max_positions)
    data = config.data.copy_and_resolve_references()
    data.eval = eval_source(data)
    data.max_length = data.max_length or min(USUAL_LENGTH, max_positions)
    return data


def eval_source(data: Any) -> str:
    """What `data.eval` names, of the section `data`; empty where it names nothing."""
    if data["eval"] != "auto":
        return data["eval"]
    own = data["train"].startswith("pydoc:")
    return data["train"].replace("[train]", "[eval]") if own else ""


def check_positions(config: Any, max_positions: int) -> None:
    """Rows no longer than the positions that the model knows."""
    if config.data.max_length > max_positions:
        raise UserError(
            "rows would be longer than the model's positions",
            where="config.data.max_length",
            expected=f"at most {max_positions}",
            got=str(config.data.max_length),
            fix=f"--config.data.max_length={max_positions}",
        )
