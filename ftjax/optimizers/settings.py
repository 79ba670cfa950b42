"""The optimizers by name, and the settings that each one has.

adamw          Adam with decoupled decay (arXiv 1711.05101)
adamw8bit      the same, its moments in 8-bit blocks (2110.02861)
adafactor      a factored second moment, no first one (1804.04235)
lion           the sign of a momentum (2302.06675); wants a tenth of Adam's rate
muon           orthogonal updates of matrices (2502.16982), Adam for the rest
schedule_free  AdamW whose weights are averaged, instead of a schedule (2405.15682)
"""

from typing import Any

AS_USUAL = -1.0

_ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
# An optimizer has the settings of its row, and no others.
USUAL: dict[str, dict[str, float]] = {
    "adamw": _ADAM,
    "adamw8bit": _ADAM,
    "adafactor": {},
    "lion": {"b1": 0.9, "b2": 0.99},
    "muon": {"b1": 0.95, "b2": 0.999, "eps": 1e-8},
    "schedule_free": _ADAM,
}
NAMES = tuple(USUAL)


def resolve(config: Any) -> dict[str, float]:
    """The settings of `config.name`, -1 replaced by what is usual for it."""
    asked = {key: getattr(config, key) for key in USUAL[config.name]}
    usual = USUAL[config.name]
    return {k: usual[k] if v == AS_USUAL else v for k, v in asked.items()}


def unused(config: Any) -> list[str]:
    """The settings that were given and that `config.name` does not have."""
    known = {key for row in USUAL.values() for key in row} - USUAL[config.name].keys()
    return sorted(key for key in known if getattr(config, key) != AS_USUAL)
