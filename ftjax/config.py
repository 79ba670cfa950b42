"""What a config must satisfy before anything is read: ranges, rules between keys."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftjax.errors import UserError
from ftjax.optimizers import settings
from ftjax.quant.formats import NAMES as FORMATS

Test = Callable[[Any], bool]


@dataclass(frozen=True)
class Range:
    """What a value may be: a test, and the words for it."""

    words: str
    test: Test


POSITIVE = Range("a positive number", lambda x: x > 0)
AT_LEAST_0 = Range("0 or more", lambda x: x >= 0)
AT_LEAST_1 = Range("1 or more", lambda x: x >= 1)
SHARE = Range("at least 0, below 1", lambda x: 0 <= x < 1)
SETTING = Range(
    "at least 0, below 1, or -1 (as usual)", lambda x: 0 <= x < 1 or x == -1
)
NOT_EMPTY = Range("a name or a path", bool)


# Counters and seeds are 32-bit integers; a larger float is soon infinite in 32 bits.
LARGEST: dict[type, float] = {bool: 1, int: 2**31 - 1, float: 1e30}
METHODS = ("lora", "vera", "full", "freeze", "bottleneck", "ia3", "prompt", "prefix")


def one_of(*values: str) -> Range:
    return Range(" or ".join(values), lambda x: x in values)


RULES: dict[str, Range] = {
    "seed": AT_LEAST_0,
    "model.path": NOT_EMPTY,
    "model.dtype": one_of("auto", "float32", "bfloat16"),
    "model.param_dtype": one_of("auto", "float32", "bfloat16"),
    "model.remat": one_of("none", "dots", "full"),
    "method.name": Range(
        "lora, qlora, vera, full, freeze, bottleneck, ia3, prompt or prefix",
        lambda x: x in METHODS,
    ),
    "method.rank": AT_LEAST_1,
    "method.alpha": POSITIVE,
    "method.dropout": SHARE,
    "method.targets": NOT_EMPTY,
    "method.init": one_of("kaiming", "gaussian", "loftq"),
    "method.layers": AT_LEAST_0,
    "method.d_initial": POSITIVE,
    "method.projection_prng_key": AT_LEAST_0,
    "method.kind": one_of("houlsby", "pfeiffer"),
    "method.size": AT_LEAST_1,
    "method.tokens": AT_LEAST_1,
    "method.std": AT_LEAST_0,
    "method.activation": one_of("gelu", "relu", "silu"),
    "quant.format": one_of("none", *FORMATS),
    "quant.group": Range("-1 (as usual), 0 (a channel) or more", lambda x: x >= -1),
    "quant.scheme": one_of("symmetric", "affine"),
    "quant.targets": NOT_EMPTY,
    "data.train": NOT_EMPTY,
    "data.max_length": Range("2 or more, or 0 (as usual)", lambda x: x == 0 or x >= 2),
    "data.overlong": one_of("truncate", "drop", "error"),
    "data.empty_completion": one_of("drop", "error"),
    "data.on_bad_row": one_of("error", "skip"),
    "data.eval_rows": AT_LEAST_0,
    "loss.chunk": AT_LEAST_1,
    "loss.temperature": POSITIVE,
    "loss.clip_low": Range("above 0, at most 1", lambda x: 0 < x <= 1),
    "loss.clip_high": POSITIVE,
    "loss.max_kl": AT_LEAST_0,
    "loss.gamma": Range("above 0, at most 1", lambda x: 0 < x <= 1),
    "loss.lam": Range("between 0 and 1", lambda x: 0 <= x <= 1),
    "loss.value_weight": AT_LEAST_0,
    "loss.clip_value": POSITIVE,
    "rollout.group": AT_LEAST_1,
    "rollout.max_new_tokens": AT_LEAST_1,
    "rollout.top_k": AT_LEAST_0,
    "rollout.top_p": Range("above 0, at most 1", lambda x: 0 < x <= 1),
    "rollout.batches": AT_LEAST_1,
    "rollout.passes": AT_LEAST_1,
    "rollout.eval_temperature": AT_LEAST_0,
    "reward.words_wanted": AT_LEAST_1,
    "reward.max_nan": Range("between 0 and 1", lambda x: 0 <= x <= 1),
    "optim.name": one_of(*settings.NAMES),
    "optim.lr": POSITIVE,
    "optim.b_lr_ratio": POSITIVE,
    "optim.schedule": one_of("constant", "linear", "cosine", "wsd"),
    "optim.warmup": AT_LEAST_0,
    "optim.final": Range("between 0 and 1", lambda x: 0 <= x <= 1),
    "optim.decay": Range("above 0, at most 1", lambda x: 0 < x <= 1),
    "optim.b1": SETTING,
    "optim.b2": SETTING,
    "optim.eps": Range(
        "a positive number, or -1 (as usual)", lambda x: x > 0 or x == -1
    ),
    "optim.weight_decay": AT_LEAST_0,
    "optim.clip_norm": AT_LEAST_0,
    "train.steps": AT_LEAST_1,
    "train.epochs": POSITIVE,
    "train.batch_size": AT_LEAST_1,
    "train.accumulate": AT_LEAST_1,
    "train.log_every": AT_LEAST_1,
    "train.eval_every": AT_LEAST_0,
    "train.save_every": AT_LEAST_1,
    "train.sample_every": AT_LEAST_0,
    "train.sample_rows": AT_LEAST_0,
    "train.sample_tokens": AT_LEAST_1,
    "train.keep_last": AT_LEAST_1,
    "train.keep_best": AT_LEAST_0,
    "train.max_skipped": AT_LEAST_1,
}


def validate(config: Any) -> None:
    """Checks every value against its range, then the rules between keys.

    Raises:
      UserError: names the key, what it may be and what it is.
    """
    for key, allowed in RULES.items():
        section, _, name = key.rpartition(".")
        group = config.get(section, {}) if section else config
        if name not in group or group[name] is None:
            continue
        value = group[name]
        number = isinstance(value, int | float)
        far = number and not abs(value) <= LARGEST[type(value)]
        if far or not allowed.test(value):
            more = f", at most {LARGEST[type(value)]:,}" if far else ""
            raise UserError(
                "a value outside its range",
                where=f"config.{key}",
                expected=allowed.words + more,
                got=repr(value)[:100],
            )
    _contradictions(config)
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
    if not quantized and config.method.get("init") == "loftq":
        raise UserError(
            "LoftQ begins with the error of a quantization, and there is none",
            where="config.method.init, config.quant.format",
            expected="method=qlora, or quant.format=nf4, fp4, int8 or int4",
            got="quant.format=none",
            fix="--config.method.init=kaiming leaves the base as it is",
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
    size, unit = train.batch_size * rollout.batches, rollout.batches * rollout.passes
    if size % rollout.group:
        near = -(-train.batch_size // rollout.group) * rollout.group
        raise UserError(
            "a rollout is not made of whole groups",
            where="config.train.batch_size, config.rollout.group",
            expected="batch_size * rollout.batches divisible by rollout.group",
            got=f"{size} completions in groups of {rollout.group}",
            fix=f"--config.train.batch_size={near}",
        )
    for name in ("save_every", "eval_every"):
        if train[name] % unit:
            near = -(-train[name] // unit) * unit
            raise UserError(
                "a run is saved between rollouts only: half of one cannot continue",
                where=f"config.train.{name}, config.rollout",
                expected=f"a multiple of batches * passes = {unit}",
                got=str(train[name]),
                fix=f"--config.train.{name}={near}",
            )


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
    )


def total_steps(config: Any, rows_per_epoch: int) -> int:
    """Optimizer steps of the run: `train.steps`, or `train.epochs` (1 if neither)."""
    if config.train.steps is not None:
        return config.train.steps
    epochs = 1.0 if config.train.epochs is None else config.train.epochs
    steps = math.ceil(epochs * rows_per_epoch / config.train.batch_size)
    if config.optim.warmup >= steps > 0 and config.optim.warmup > 0:
        raise _long_warmup(config.optim.warmup, steps)
    return max(1, steps)


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
    if data.eval == "auto":
        own = data.train.startswith("pydoc:")
        data.eval = data.train.replace("[train]", "[eval]") if own else ""
    data.max_length = data.max_length or min(USUAL_LENGTH, max_positions)
    return data


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
