"""Long texts in windows, and many texts in one stream.

A window begins with the last token of the one before it, which is context there and was
predicted here: every token after the first is predicted once.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ftjax.data.encode import Example
from ftjax.data.groups import Encoded
from ftjax.data.report import DataReport
from ftjax.data.schema import TextRow
from ftjax.errors import UserError


def in_windows(
    kept: list[Encoded], data_config: Any, report: DataReport
) -> list[Encoded]:
    """The examples as `data.join` and `data.overlong=split` want them cut."""
    join = data_config.join and kept
    if not join and data_config.overlong != "split":
        return kept
    if join:
        whole = [isinstance(group.samples[0], TextRow) for group, _ in kept]
        kept = [(kept[0][0], (joined([e for _, [e] in kept], whole),))]
        report.warnings.append(
            "data.join: the documents are one stream, and see those before them"
        )
    most = data_config.max_length
    kept = [(group, (part,)) for group, [e] in kept for part in windows(e, most)]
    report.windows = len(kept)
    return kept


def refuse_windows(data_config: Any, reads: str) -> None:
    """Only answers and texts, one by one, can be cut into windows.

    Raises:
      UserError: another task asks for it.
    """
    asked = ["overlong=split"] if data_config.overlong == "split" else []
    asked += ["join=True"] if data_config.join else []
    if asked and reads != "answers":
        raise UserError(
            "answers that are compared cannot be cut into windows",
            where="config.data.overlong, config.data.join",
            expected="overlong=truncate, drop or error, and join=False",
            got=", ".join(asked),
        )


def windows(example: Example, most: int) -> list[Example]:
    """The example, or windows of `most` tokens of it (the last may be shorter).

    Windows in which nothing is trained on are left out.
    """
    n = len(example.ids)
    if n <= most:
        return [example]
    places = range(0, n - 1, most - 1)
    cut = [_part(example, start, start + most) for start in places]
    return [part for part in cut if part.trained.any()]


def joined(examples: Sequence[Example], whole: Sequence[bool]) -> Example:
    """All examples as one, in their order: a document sees those before it.

    Args:
      examples: the documents, one at least.
      whole: whether all of a document is trained on, so also its first token, which has
        something before it here.
    """
    trained = [e.trained.copy() for e in examples]
    for marks, all_of_it in zip(trained, whole, strict=True):
        marks[:1] = all_of_it
    trained[0][:1] = False
    weights = [
        marks.astype(np.float32) if e.weights is None else e.weights
        for e, marks in zip(examples, trained, strict=True)
    ]
    weighted = any(e.weights is not None for e in examples)
    sizes = [e.sizes for e in examples if e.sizes is not None]
    return Example(
        np.concatenate([e.ids for e in examples]),
        np.concatenate(trained),
        examples[0].where,
        weights=np.concatenate(weights) if weighted else None,
        sizes=np.concatenate(sizes) if len(sizes) == len(examples) else None,
    )


def _part(example: Example, start: int, end: int) -> Example:
    """The tokens [start, end), of which the first is never predicted."""
    trained = example.trained[start:end].copy()
    trained[:1] = False
    where = f"{example.where}, token {start:,}" if start else example.where
    return Example(
        example.ids[start:end],
        trained,
        where,
        weights=None if example.weights is None else example.weights[start:end],
        sizes=None if example.sizes is None else example.sizes[start:end],
    )
