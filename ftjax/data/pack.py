"""Packing: several short examples into each row of a fixed length."""

from collections.abc import Sequence

import numpy as np

WINDOW = 8192  # examples that are packed against each other


def pack(
    lengths: np.ndarray, order: np.ndarray, row_length: int
) -> list[tuple[int, ...]]:
    """Best-fit decreasing within windows of the order.

    Args:
      lengths: int [n], the slots of every example, each at most `row_length`.
      order: int [m], the examples to pack, in the order that forms the windows.
      row_length: the slots of a row.

    Returns:
      The examples of each row. Windows keep rows of one length from gathering at one
      end of the epoch and cost one partly filled row each.
    """
    rows: list[tuple[int, ...]] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        # Stable: examples of equal length keep the order's own sequence.
        longest_first = window[np.argsort(-lengths[window], kind="stable")]
        rows += _best_fit(lengths[longest_first], longest_first, row_length)
    return rows


def _best_fit(
    lengths: np.ndarray, names: np.ndarray, row_length: int
) -> list[tuple[int, ...]]:
    rows: list[list[int]] = []
    # with_room[r]: rows that have r slots left; bit r of `open_` is set where any is.
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    open_ = 0
    for length, name in zip(lengths.tolist(), names.tolist(), strict=True):
        fitting = open_ >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                open_ &= ~(1 << room)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(name)
        left = room - length
        if left:
            with_room[left].append(row)
            open_ |= 1 << left
    return [tuple(row) for row in rows]


def fill(
    lengths: np.ndarray, rows: Sequence[tuple[int, ...]], row_length: int
) -> float:
    """The share of slots that hold a token."""
    slots = sum(int(lengths[list(row)].sum()) for row in rows)
    return slots / (len(rows) * row_length) if rows else 0.0
