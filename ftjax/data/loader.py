"""Examples to batches. No state: a row's number names its examples."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from ftjax.data.dataset import Dataset
from ftjax.data.frame import Batch, Frame, Packed, prompt_places, slots
from ftjax.data.order import permutation
from ftjax.data.pack import fill, pack

MULTIPLE = 32  # of row lengths, so that near lengths compile to one program


def group_slots(dataset: Dataset) -> np.ndarray:
    """The places that each group takes: those of all its members, int64 [n]."""
    sizes = np.array([slots(e, dataset.ends) for e in dataset.examples], np.int64)
    total = np.array([sizes[list(group)].sum() for group in dataset.groups], np.int64)
    return total - prompt_slots(dataset)


def prompt_slots(dataset: Dataset) -> np.ndarray:
    """The places of each group's prompt, where that stands once: int64 [n], else 0."""
    if not dataset.shared:
        return np.zeros(len(dataset.groups), np.int64)
    members = [[dataset.examples[i] for i in group] for group in dataset.groups]
    return np.array([prompt_places(pair) for pair in members], np.int64)


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
          0 = padding) and positions (from 0 per document), int32; weights, float32: 0
          where the target is not trained on, else 1 or what its message weighs. Never
          across a document's end. Of data with numbers per group also these, float32
          [rows, U], 0 where a row has fewer than U groups; member m of M of group u is
          segment M * u + m + 1. Where the prompt stands once, it is segment 3 u + 1,
          the two members are the next two, and `parents`, int32, is the prompt's
          segment for their tokens (0: none), whose positions go on from it.
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
        names, kind = tuple(data.values), (data.members, data.ends, data.shared)
        frame = Frame(self.length, self.most, names, *kind)
        return frame.arrays(
            [[self._packed(group) for group in groups] for groups in chosen], rows
        )

    def _packed(self, group: int) -> Packed:
        data = self.dataset
        numbers = {name: float(array[group]) for name, array in data.values.items()}
        return numbers, [data.examples[index] for index in data.groups[group]]
