"""How much each message of a conversation counts: `weight`, or `train`.

`weight` is a number, 0 for a turn that is left out (as in OpenAI's fine-tuning files,
which know 0 and 1); `train` is true or false (as in Axolotl's).
"""

import math
from typing import Any

from ftjax.data.words import clip
from ftjax.errors import UserError

LARGEST = 1e4
Weights = tuple[float, ...]


def turn_weights(messages: list[dict[str, Any]], where: str) -> Weights | None:
    """The weight of each message; None where no message says anything but 1.

    Raises:
      UserError: a weight that is no number of at least 0, a `train` that is neither
        true nor false, or that asks for what is no answer.
    """
    found = tuple(_weight(m, f"{where}, message {i}") for i, m in enumerate(messages))
    return None if set(found) == {1.0} else found


def weighted(where: str) -> UserError:
    """Weights in a row of a task that compares answers whole."""
    return UserError(
        "messages have weights, but answers that are compared count as they are",
        where=where,
        expected="no `weight` and no `train`, or 1 and true",
        fix="delete these keys, or imitate the answers with configs/sft.py",
    )


def _weight(message: dict[str, Any], where: str) -> float:
    weight, train = message.get("weight"), message.get("train")
    if train is True and message.get("role") != "assistant":
        raise UserError(
            "only what the assistant says is trained on",
            where=where,
            got=f"`train` is true, the role {clip(message.get('role'))}",
            fix="delete `train` there, or data.completion_only=False for whole rows",
        )
    if train is not None and not isinstance(train, bool):
        raise UserError(
            "`train` of a message is neither true nor false",
            where=where,
            got=clip(train),
        )
    if weight is None:
        return float(train is not False)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or not 0 <= weight <= LARGEST:
        raise UserError(
            "`weight` of a message is no weight",
            where=where,
            expected=f"a number from 0 (left out) to {LARGEST:,.0f}",
            got=clip(weight),
        )
    return 0.0 if train is False else float(weight)
