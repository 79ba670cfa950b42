"""What the golden steps of every objective are about, for torch and for the tests.

Sequences are made of a formula, and what was said of them before is made of names.
"""

from typing import Any

import numpy as np

from tests.goldens.weights import random_tensor

Ids = list[int]

# Of each task, what differs from `loss` of its config. Adam's first step turns the
# rounding of a gradient that is nearly 0 into an update: no weight has one with these.
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3},
    "orpo": {"beta": 0.3},
    "cpo": {"beta": 0.2, "nll_weight": 0.7, "label_smoothing": 0.1},
    "simpo": {"gamma": 3.0},
    "reward": {"center": 0.05},
    "kto": {"beta": 0.1, "desirable_weight": 1.2, "undesirable_weight": 0.7},
    "grpo": {"beta": 0.6, "clip_high": 0.3, "temperature": 1.3},
    "ppo": {
        "beta": 0.2,
        "clip_high": 0.3,
        "temperature": 1.3,
        "gamma": 0.9,
        "value_weight": 0.3,
    },
    "distill": {
        "divergence": "js_divergence",
        "beta": 0.3,
        "temperature": 1.7,
        "nll_weight": 0.2,
    },
}
MARGINS = (0.5, 0.0, -1.0, 2.0, 0.25)  # of the pairs
GROUP = 3  # answers to each prompt, of what was sampled
REWARDS = (1.0, -0.5, 0.25, 2.0, 0.0, 0.5)  # of what was sampled
NOISE = 1.0  # how far others are from what the first model says


def ids(size: int, shift: int) -> Ids:
    return [(5 * i * i + 7 * i + shift + 1) % 64 for i in range(size)]


def pairs() -> list[tuple[Ids, Ids, Ids]]:
    """(prompt, chosen, rejected) of each pair, of unequal lengths."""
    sizes = ((5, 9, 4), (2, 3, 12), (8, 6, 6), (1, 10, 2), (4, 2, 3))
    return [
        tuple(ids(size, 11 * i + 17 * j) for j, size in enumerate(row))  # type: ignore[misc]
        for i, row in enumerate(sizes)
    ]


def rated() -> list[tuple[Ids, Ids, bool]]:
    """(prompt, answer, whether it is good): of each pair, or of one side of it."""
    kept = ("both", "good", "bad", "both", "good")
    found = []
    for (prompt, good, bad), sides in zip(pairs(), kept, strict=True):
        if sides in ("both", "good"):
            found.append((prompt, good, True))
        if sides in ("both", "bad"):
            found.append((prompt, bad, False))
    return found


def sampled() -> list[tuple[Ids, Ids]]:
    """(prompt, answer) of everything that was sampled, the answers to a prompt
    together."""
    sizes = ((4, (7, 1, 5)), (2, (3, 9, 6)))
    return [
        (ids(size, 13 * i), ids(n, 29 * i + 11 * j + 3))
        for i, (size, answers) in enumerate(sizes)
        for j, n in enumerate(answers)
    ]


def noise(name: str, row: int, size: int) -> np.ndarray:
    """By how much `name` differs from the first model at each token of an answer."""
    values = random_tensor(f"{name} of answer {row}", (size,))
    return (NOISE * values).astype(np.float32)
