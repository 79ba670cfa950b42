"""What each value of a config may be, and the words for it."""

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
BETWEEN = Range("between 0 and 1", lambda x: 0 <= x <= 1)
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
    "parallel": one_of("jit", "pmap"),
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
    "data.overlong": one_of("truncate", "drop", "error", "split"),
    "data.empty_completion": one_of("drop", "error"),
    "data.on_bad_row": one_of("error", "skip"),
    "data.eval_rows": AT_LEAST_0,
    "data.join_window": AT_LEAST_0,
    "data.stream_wait": POSITIVE,
    "loss.chunk": AT_LEAST_1,
    "loss.beta": AT_LEAST_0,
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
    "loss.clip_low": Range("above 0, at most 1", lambda x: 0 < x <= 1),
    "loss.clip_high": POSITIVE,
    "loss.max_kl": AT_LEAST_0,
    "loss.lam": BETWEEN,
    "loss.value_weight": AT_LEAST_0,
    "loss.clip_value": POSITIVE,
    "rollout.group": AT_LEAST_1,
    "rollout.max_new_tokens": AT_LEAST_1,
    "rollout.max_num_seqs": AT_LEAST_0,
    "reward.unfinished": Range("a finite number", math.isfinite),
    "rollout.top_k": AT_LEAST_0,
    "rollout.top_p": Range("above 0, at most 1", lambda x: 0 < x <= 1),
    "rollout.batches": AT_LEAST_1,
    "rollout.passes": AT_LEAST_1,
    "rollout.eval_temperature": AT_LEAST_0,
    "reward.words_wanted": AT_LEAST_1,
    "reward.max_nan": BETWEEN,
    "loss.neftune_alpha": AT_LEAST_0,
    "optim.name": one_of(*settings.NAMES),
    "optim.lr": POSITIVE,
    "optim.b_lr_ratio": POSITIVE,
    "optim.schedule": one_of("constant", "linear", "cosine", "wsd"),
    "optim.warmup": Range("-1 (as usual), 0 or more", lambda x: x >= -1),
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

OPTIONAL = ("train.steps", "train.epochs")


def check_ranges(config: Any, where: str = "config.") -> None:
    """Checks the values of a configuration, or of one that was saved, one by one.

    Args:
      config: a `ConfigDict`, or the dict of a config.json.
      where: what is written before the key of a value that is outside its range.

    Raises:
      UserError: names the key, what it may be and what it is.
    """
    for key, allowed in RULES.items():
        section, _, name = key.rpartition(".")
        group = config.get(section, {}) if section else config
        if name not in group or (group[name] is None and key in OPTIONAL):
            continue
        value = group[name]
        number = isinstance(value, int | float)
        far = number and not abs(value) <= LARGEST[type(value)]
        if far or not _passes(allowed, value):
            more = f", at most {LARGEST[type(value)]:,}" if far else ""
            raise UserError(
                "a value outside its range",
                where=f"{where}{key}",
                expected=allowed.words + more,
                got=repr(value)[:100],
            )


def _passes(allowed: Range, value: Any) -> bool:
    try:
        return bool(allowed.test(value))
    except TypeError:  # a file that was edited may hold anything
        return False
