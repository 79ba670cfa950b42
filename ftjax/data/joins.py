"""Halves of pairs that stand in different rows, joined where their prompts are equal.

A row with a `prompt` and `chosen` alone, or `rejected` alone, is a half. It waits for
halves of the other side with the same prompt that come at most `window` rows later.
Each chosen answer makes one pair with each rejected one so near: a pair appears where
the later of its two rows does, and those of one row in the order of the earlier rows.
A half that leaves the window without any pair is over: a chosen answer is one to
imitate, where the task imitates, and anything else is dropped and counted.

Prompts are equal where the columns that hold them are: a text is not a list of
messages. What joins depends on the rows and the window alone.
"""

import json
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ftjax.data import preferences
from ftjax.data.groups import Group, pair_of, read_groups
from ftjax.data.report import DataReport
from ftjax.data.sources import Row

WINDOW = 1000  # rows, where no config says
JOINING = ("pairs", "mixed")  # what is read of rows whose halves are joined
NO_CHOSEN = "a rejected answer that no chosen one joined"
NO_REJECTED = "a chosen answer that no rejected one joined"


@dataclass
class _Half:
    """A row that waits; `alone` is its answer, as a group of one."""

    row: Row
    side: str
    key: str
    number: int
    alone: Group
    joined: bool = False


class Joiner:
    """Reads rows to groups, and keeps the halves of the last `window` rows.

    Args:
      window: rows that a half waits for; with 0 none is ever joined.
      has_template: as for `read_groups`.
      reads: the kind of rows that the task wants; one of JOINING joins.
      report: counts what is joined, and what is left over.
    """

    def __init__(self, window: int, has_template: bool, reads: str, report: DataReport):
        self.window, self.has_template = window, has_template
        self.reads, self.report = reads, report
        self._number = 0
        self._order: deque[_Half] = deque()
        self._waiting: dict[tuple[str, str], list[_Half]] = defaultdict(list)

    def next_row(self) -> Iterator[Group]:
        """Moves the window on by a row: what the halves that leave it become."""
        self._number += 1
        while self._order and self._number - self._order[0].number > self.window:
            yield from self._leave()

    def rest(self) -> Iterator[Group]:
        """What the halves become that still wait when the rows are over."""
        while self._order:
            yield from self._leave()

    def read(self, row: Row) -> tuple[Group, list[Group]]:
        """The row for itself, for the account, and the groups that are ready by it.

        Raises:
          UserError: a fault of the row, or of a pair that it completes.
        """
        side = preferences.half(row.values) if self.reads in JOINING else None
        if side is None:
            found = read_groups(row, self.has_template, self.reads)
            return found[0], found
        half = self._half(row, side)
        other = "rejected" if side == "chosen" else "chosen"
        waiting = self._waiting.get((half.key, other), [])
        pairs = [self._join(one, half) for one in waiting]
        for one in waiting:
            one.joined = half.joined = True
        self.report.joined += len(pairs)
        for pair in pairs:
            if pair.identical:
                self.report.identical.add(pair.where)
        self._order.append(half)
        self._waiting[half.key, side].append(half)
        return half.alone, pairs

    def _half(self, row: Row, side: str) -> _Half:
        # Read as a pair of twice the same answer, so that its faults are found here.
        twice = {**row.values, "chosen": row.values[side], "rejected": row.values[side]}
        pair = pair_of(Row(twice, row.where), self.has_template)
        alone = replace(
            pair,
            samples=pair.samples[:1],
            schema=f"{side} alone",
            values={"answer": 1.0},
            identical=False,
        )
        return _Half(row, side, _key(row, side), self._number, alone)

    def _join(self, one: _Half, other: _Half) -> Group:
        chosen, rejected = (one, other) if one.side == "chosen" else (other, one)
        values = {**chosen.row.values, "rejected": rejected.row.values["rejected"]}
        where = f"{chosen.row.where} with {rejected.row.where}"
        return pair_of(Row(values, where), self.has_template)

    def _leave(self) -> Iterator[Group]:
        half = self._order.popleft()
        waiting = self._waiting[half.key, half.side]
        waiting.pop(0)  # those of one prompt leave in the order in which they came
        if not waiting:
            del self._waiting[half.key, half.side]
        if half.joined:
            return
        if half.side == "chosen" and self.reads == "mixed":
            self.report.imitated += 1
            yield half.alone
        else:
            reason = NO_REJECTED if half.side == "chosen" else NO_CHOSEN
            self.report.drop(reason, half.row.where)


def _key(row: Row, side: str) -> str:
    """Equal for rows that answer the same prompt."""
    values: dict[str, Any] = row.values
    prompt = {
        n: x for n, x in values.items() if n in preferences.USED and x is not None
    }
    if not any(name in prompt for name in preferences.PROMPTS):
        prompt["before"] = preferences.before(row, side)
    return json.dumps(prompt, sort_keys=True)
