"""Groups of examples as the arrays of a batch, for files and for streams."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ftjax.data.encode import Example
from ftjax.data.groups import shared_prompt

Batch = dict[str, np.ndarray]
# The numbers of a group, and its members.
Packed = tuple[Mapping[str, float], Sequence[Example]]


def slots(example: Example, ends: bool = False) -> int:
    """The places that an example takes in a row: its tokens but the last, which only
    is a target; that one too, where a head reads it (`ends`)."""
    return len(example.ids) - (not ends)


def prompt_places(members: Sequence[Example]) -> int:
    """The places of a prompt that two members share.

    Its last token is no part of it: that stands at the head of each answer, whose
    first token it predicts.
    """
    return max(0, shared_prompt(tuple(members)) - 1)


@dataclass(frozen=True)
class Frame:
    """The shape of a batch's rows.

    Attributes:
      length: T, slots of a row; most: U, groups of a row.
      names: of the numbers that come with a group.
      members: of a group, at most.
      ends: whether rows hold the last token of an example too.
      shared: whether the prompt of a group stands once, before its members.
    """

    length: int
    most: int
    names: tuple[str, ...]
    members: int
    ends: bool
    shared: bool = False

    def arrays(self, chosen: Sequence[Sequence[Packed]], rows: int) -> Batch:
        """The groups of each row as arrays [rows, T], [rows, U]; see `Loader.batch`."""
        names: tuple[str, ...] = ("tokens", "targets", "segments", "positions")
        names += ("parents",) if self.shared else ()
        batch = {name: np.zeros((rows, self.length), np.int32) for name in names}
        batch["weights"] = np.zeros((rows, self.length), np.float32)
        batch |= {name: np.zeros((rows, self.most), np.float32) for name in self.names}
        for row, groups in enumerate(chosen):
            at, start = {name: array[row] for name, array in batch.items()}, 0
            for place, (values, members) in enumerate(groups):
                for name in self.names:
                    at[name][place] = values.get(name, 0)
                start = self._group(at, start, members, place)
        return batch

    def _group(
        self, row: Batch, start: int, members: Sequence[Example], place: int
    ) -> int:
        """Writes a group into a row; returns where the next one begins."""
        segment = (self.members + self.shared) * place + 1
        prompt = prompt_places(members) if self.shared else 0
        if prompt:
            start = _write(row, start, members[0], slice(0, prompt), segment)
        for m, example in enumerate(members, self.shared):
            part = slice(prompt, slots(example, self.ends))
            if prompt:
                row["parents"][start : start + part.stop - prompt] = segment
            start = _write(row, start, example, part, segment + m)
        return start


def _write(row: Batch, start: int, example: Example, part: slice, segment: int) -> int:
    """Writes some places of an example into a row; returns where the next begin."""
    first, size = part.start, part.stop - part.start
    end, predicted = start + size, min(part.stop, len(example.ids) - 1) - first
    row["tokens"][start:end] = example.ids[part]
    targets = slice(first + 1, first + 1 + predicted)
    counts = example.trained if example.weights is None else example.weights
    row["targets"][start : start + predicted] = example.ids[targets]
    row["weights"][start : start + predicted] = counts[targets]
    row["segments"][start:end] = segment
    row["positions"][start:end] = np.arange(first, part.stop)
    return end
