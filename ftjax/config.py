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
BETWEEN = Range("between 0 and 1", lambda x: 0 <= x <= 1)
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
    "model.norm_dtype": one_of("auto", "float32", "bfloat16"),
    "model.head_dtype": one_of("auto", "float32", "bfloat16"),
    "model.remat": one_of("none", "dots", "full"),
    "method.name": Range(
        "lora, qlora, vera, full, freeze, bottleneck, ia3, prompt or prefix",
        lambda x: x in METHODS,
    ),
    "method.rank": AT_LEAST_1,
    "method.alpha": POSITIVE,
    "method.dropout": SHARE,
    "method.targets": NOT_EMPTY,
    "method.dtype": one_of("float32", "bfloat16"),
    "method.init": one_of("kaiming", "gaussian", "a_zero", "pissa", "olora", "loftq"),
    "method.loftq_iters": AT_LEAST_1,
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
    "data.join_window": AT_LEAST_0,
    "data.stream_wait": POSITIVE,
    "loss.chunk": AT_LEAST_1,
    "loss.beta": POSITIVE,
    "loss.tau": POSITIVE,
    "loss.gamma": AT_LEAST_0,
    "loss.center": AT_LEAST_0,
    "loss.temperature": POSITIVE,
    "loss.label_smoothing": SHARE,
    "loss.ld_alpha": BETWEEN,
    "loss.nll_weight": AT_LEAST_0,
    "loss.answer_weight": AT_LEAST_0,
    "loss.text_weight": AT_LEAST_0,
    "loss.desirable_weight": AT_LEAST_0,
    "loss.undesirable_weight": AT_LEAST_0,
    "loss.nll_scope": one_of("prompt+chosen", "chosen"),
    "loss.reference": NOT_EMPTY,
    "optim.name": one_of(*settings.NAMES),
    "optim.lr": POSITIVE,
    "optim.b_lr_ratio": POSITIVE,
    "optim.schedule": one_of("constant", "linear", "cosine", "wsd"),
    "optim.warmup": AT_LEAST_0,
    "optim.final": BETWEEN,
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
        group = config[section] if section else config
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
    _check_stream(config)
    _check_init(config)
    _check_optimizer(config)


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
