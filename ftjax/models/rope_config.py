"""Rotary embedding settings out of a `config.json`, in its old and its new form.

Old: `rope_theta` beside `rope_scaling: {"type" or "rope_type": ..., "factor": ...}`.
New: `rope_parameters: {"rope_type": ..., "rope_theta": ..., ...}`. The precedence and
the defaults are those of transformers' `RotaryEmbeddingConfigMixin`.
"""

import math
from typing import Any, NoReturn

from ftjax.models.config_reader import ConfigReader, finite, refuse_value
from ftjax.models.spec import Rope

KINDS = ("default", "linear", "llama3", "yarn")

# The keys a kind computes with; any other key of the dict is refused by name.
_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_TAKES = {
    "yarn": (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
_EVERYWHERE = {
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}


class _Scaling:
    """The rope dict, with errors that name `rope_scaling.factor` and the like."""

    def __init__(self, config: ConfigReader):
        old, new = config.get("rope_scaling"), config.get("rope_parameters")
        if old and new and old != new:
            config.refuse(
                "rope_scaling",
                "rope_scaling or rope_parameters, not both with other values",
            )
        self.key = "rope_scaling" if old else "rope_parameters"
        self.where, self.values = config.where, old or new or {}
        if not isinstance(self.values, dict):
            config.refuse(self.key, "an object such as {'rope_type': 'default'}")
        for key, value in self.values.items():
            if isinstance(value, dict):
                self.refuse(key, "one setting for all layers, not one per layer type")

    def refuse(self, key: str, supported: str) -> NoReturn:
        refuse_value(self.where, f"{self.key}.{key}", self.values.get(key), supported)

    def number(self, key: str, default: float, *, above: float = 0.0) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        return finite(value, above, lambda want: self.refuse(key, want))


def read_rope(config: ConfigReader, *, theta: float, max_positions: int) -> Rope:
    """The rotary embedding of a model whose type's default base is `theta`."""
    scaling = _Scaling(config)
    theta = scaling.number("rope_theta", config.number("rope_theta", theta))
    kind = scaling.values.get("rope_type", scaling.values.get("type", "default"))
    if kind not in KINDS:
        name = "rope_type" if "rope_type" in scaling.values else "type"
        scaling.refuse(name, f"one of {', '.join(KINDS)}")
    _check_keys(scaling, kind)
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=scaling.number("factor", 1.0))
    original = _original_positions(config, scaling, max_positions)
    if kind == "llama3":
        return _llama3(scaling, theta, original)
    return _yarn(scaling, theta, original, max_positions)


def _check_keys(scaling: _Scaling, kind: str) -> None:
    for key in _NEEDS[kind]:
        if key not in scaling.values:
            scaling.refuse(key, f"a number: {kind} rope scaling needs it")
    known = {*_EVERYWHERE, *_NEEDS[kind], *_TAKES.get(kind, ())}
    for key, value in scaling.values.items():
        if key not in known and value is not None:
            scaling.refuse(key, f"no such key for {kind} rope scaling")
    if scaling.values.get("partial_rotary_factor") not in (None, 1, 1.0):
        scaling.refuse("partial_rotary_factor", "1 (the whole head is rotated)")


def _original_positions(
    config: ConfigReader, scaling: _Scaling, max_positions: int
) -> int:
    """The context before stretching; a top-level key wins, as in transformers."""
    key = "original_max_position_embeddings"
    if config.get(key) is not None:
        return config.integer(key, max_positions)
    value: Any = scaling.values.get(key)
    if value is None:
        return max_positions
    if isinstance(value, bool) or value != int(scaling.number(key, 1)):
        scaling.refuse(key, "a whole number")
    return int(value)


def _llama3(scaling: _Scaling, theta: float, original: int) -> Rope:
    low = scaling.number("low_freq_factor", 1.0)
    high = scaling.number("high_freq_factor", 4.0)
    if high <= low:
        scaling.refuse("high_freq_factor", f"more than low_freq_factor, {low:g}")
    return Rope(
        theta=theta,
        kind="llama3",
        factor=scaling.number("factor", 1.0),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=original,
    )


def _yarn(scaling: _Scaling, theta: float, original: int, longest: int) -> Rope:
    """Yarn (arXiv 2309.00071); `mscale` and `mscale_all_dim` are DeepSeek's variant."""
    factor = scaling.number("factor", longest / original)

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale = scaling.number("mscale", 0.0, above=-1e30)
    mscale_all = scaling.number("mscale_all_dim", 0.0, above=-1e30)
    ratio = temperature(1.0)
    if mscale and mscale_all:
        ratio = temperature(mscale) / temperature(mscale_all)
    truncate = scaling.values.get("truncate")
    if truncate not in (None, True, False):
        scaling.refuse("truncate", "true or false")
    return Rope(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=truncate is not False,
        attention_factor=scaling.number("attention_factor", ratio),
    )
