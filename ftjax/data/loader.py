"""Examples to batches. No state: a row's number names its examples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ftjax.data.dataset import Dataset
from ftjax.data.encode import Example
from ftjax.data.order import permutation
from ftjax.data.pack import fill, pack

MULTIPLE = 32  # of row lengths, so that near lengths compile to one program

Batch = dict[str, np.ndarray]


# The numbers of a group, and its members.
Packed = tuple[Mapping[str, float], Sequence[Example]]


@dataclass(frozen=True)
class Frame:
    """The shape of a batch's rows.

    Attributes:
      length: T, slots of a row; most: U, groups of a row.
      names: of the numbers that come with a group.
      members: of a group, at most.
      ends: whether rows hold the last token of an example too.
    """

    length: int
    most: int
    names: tuple[str, ...]
    members: int
    ends: bool

    def arrays(self, chosen: Sequence[Sequence[Packed]], rows: int) -> Batch:
        """The groups of each row as arrays [rows, T], [rows, U]; see `Loader.batch`."""
        names = ("tokens", "targets", "segments", "positions")
        batch = {name: np.zeros((rows, self.length), np.int32) for name in names}
        batch["weights"] = np.zeros((rows, self.length), np.float32)
        batch |= {name: np.zeros((rows, self.most), np.float32) for name in self.names}
        for row, groups in enumerate(chosen):
            start = 0
            for place, (values, examples) in enumerate(groups):
                for name in self.names:
                    batch[name][row, place] = values.get(name, 0)
                for m, example in enumerate(examples):
                    segment = self.members * place + m + 1
                    start = self._write(batch, row, start, example, segment)
        return batch

    def _write(
        self, batch: Batch, row: int, start: int, example: Example, segment: int
    ) -> int:
        """Writes an example into a row; returns where the next one begins."""
        size = slots(example, self.ends)
        end, predicted = start + size, start + len(example.ids) - 1
        batch["tokens"][row, start:end] = example.ids[:size]
        batch["targets"][row, start:predicted] = example.ids[1:]
        batch["weights"][row, start:predicted] = example.trained[1:]
        batch["segments"][row, start:end] = segment
        batch["positions"][row, start:end] = np.arange(size)
        return end


def slots(example: Example, ends: bool = False) -> int:
    """The places that an example takes in a row: its tokens but the last, which only
    is a target; that one too, where a head reads it (`ends`)."""
    return len(example.ids) - (not ends)


def group_slots(dataset: Dataset) -> np.ndarray:
    """The places that each group takes: those of all its members, int64 [n]."""
    sizes = np.array([slots(e, dataset.ends) for e in dataset.examples], np.int64)
    return np.array([sizes[list(group)].sum() for group in dataset.groups], np.int64)


def row_length(*datasets: Dataset, max_length: int, packing: bool) -> int:
    """The one length T of a run's rows.

    `max_length` when packing, else the longest example rounded up to a multiple of 32,
    at most `max_length`. A pair stays in one row, so that may need more.
    """
    longest = max(int(group_slots(dataset).max()) for dataset in datasets)
    rounded = -(-longest // MULTIPLE) * MULTIPLE
    if longest > max_length:
        return rounded
    return max_length if packing else min(rounded, max_length)


class Loader:
    """Batches of rows numbered from 0 over all epochs.

    Row r is row f(seed, epoch, i) of the data; epoch, i = divmod(r, rows_per_epoch). So
    any batch size, process count or restart reads the same rows in the same order.
    After the last row of an epoch the next epoch begins, within a batch too.

    Args:
      dataset: the examples.
      length: T, the slots of a row; see `row_length`.
      packing: whether several groups share a row.
      seed: fixes the packing and the order of every epoch.
      shuffle: whether epochs are shuffled; else file order.
    """

    def __init__(
        self, dataset: Dataset, *, length: int, packing: bool, seed: int, shuffle: bool
    ):
        self.dataset, self.length = dataset, length
        self.packing, self.seed, self.shuffle = packing, seed, shuffle
        lengths = group_slots(dataset)
        if len(lengths) == 0 or lengths.max() > length:
            longest = lengths.max(initial=0)
            raise ValueError(
                f"{len(lengths)} examples of up to {longest}, T = {length}"
            )
        self.rows: list[tuple[int, ...]] = [(i,) for i in range(len(lengths))]
        if packing:
            # Epoch -1 is no epoch that is read: packing has an order of its own.
            order = (
                permutation(len(lengths), seed, -1)
                if shuffle
                else np.arange(len(lengths))
            )
            self.rows = [tuple(sorted(row)) for row in pack(lengths, order, length)]
            if not shuffle:
                self.rows.sort()
        self.rows_per_epoch = len(self.rows)
        self.most = max(len(row) for row in self.rows)  # groups of a row
        self.fill = fill(lengths, self.rows, length)
        dataset.report.rows = (self.rows_per_epoch, length, self.fill)
        self._order = lru_cache(maxsize=4)(self._epoch_order)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.rows_per_epoch)
        return permutation(self.rows_per_epoch, self.seed, epoch)

    def groups(self, start: int, rows: int) -> list[list[int]]:
        """The indices of the groups in each of `rows` rows from row `start` on."""
        found = []
        for number in range(start, start + rows):
            epoch, i = divmod(number, self.rows_per_epoch)
            found.append(list(self.rows[self._order(epoch)[i]]))
        return found

    def batch(self, start: int, rows: int) -> Batch:
        """The rows start, ..., start + rows - 1 as arrays [rows, T].

        Returns:
          tokens, targets (the next token, 0 where none), segments (1.. per document,
          0 = padding) and positions (from 0 per document), int32; weights, float32: 1
          where the target is trained on. Never across a document's end. Of data with
          numbers per group also these, float32 [rows, U], 0 where a row has fewer than
          U groups; member m of M of group u is segment M * u + m + 1.
        """
        return self._fill(self.groups(start, rows), rows)

    def epoch(self, rows: int) -> Iterator[Batch]:
        """One pass in file order; the last batch is padded by rows of weight 0."""
        for batch, _ in self.epoch_groups(rows):
            yield batch

    def epoch_groups(self, rows: int) -> Iterator[tuple[Batch, list[list[int]]]]:
        """As `epoch`, each batch with the indices of the groups in its rows."""
        in_order = sorted(self.rows)
        for start in range(0, len(in_order), rows):
            groups = [list(row) for row in in_order[start : start + rows]]
            yield self._fill(groups, rows), groups

    def _fill(self, chosen: list[list[int]], rows: int) -> Batch:
        data = self.dataset
        frame = Frame(
            self.length, self.most, tuple(data.values), data.members, data.ends
        )
        return frame.arrays(
            [
                [
                    (
                        {name: numbers[group] for name, numbers in data.values.items()},
                        [data.examples[index] for index in data.groups[group]],
                    )
                    for group in groups
                ]
                for groups in chosen
            ],
            rows,
        )
