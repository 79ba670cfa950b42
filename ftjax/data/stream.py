"""Batches of a stream of rows: read once, in its order, a function of its lines alone.

Rows become groups as those of a file do. Groups go one after another into the first of
a batch's rows with room for them; one that fits into none begins the next batch. So a
batch is ready when the group after it is, and the last one, padded by empty rows, is
known to be the last. Nothing depends on when bytes came, or on how many at a time.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from ftjax.data import encode as enc
from ftjax.data.dataset import nothing_left
from ftjax.data.files import Faults, objects
from ftjax.data.frame import Batch, Frame, slots
from ftjax.data.groups import KINDS, MEMBERS, VALUES, Group
from ftjax.data.joins import Joiner
from ftjax.data.loader import MULTIPLE
from ftjax.data.notes import Notes
from ftjax.data.reading import (
    Encoded,
    Encoding,
    check_ids,
    encode_chunk,
    read_row,
    window_of,
)
from ftjax.data.report import DataReport
from ftjax.data.sources import Row
from ftjax.data.spool import HaltedError, Place, Spool
from ftjax.data.tokenizer import Tokenizer
from ftjax.errors import UserError

CHUNK = 64  # groups that are encoded together, if so many lines are there already
GROUP_SLOTS = 8  # a row of T slots has room for T / 8 groups


def stream_frame(data_config: Any, reads: str, ends: bool) -> Frame:
    """The shape of a stream's rows, which no row that is yet to come may change.

    T is `max_length`, or what the longest pair may need: its sides have `max_length`
    tokens each at most, and stay in one row.
    """
    most, members = data_config.max_length, MEMBERS[reads]
    length = most
    if members > 1:
        length = -(-members * (most - (not ends)) // MULTIPLE) * MULTIPLE
    groups = max(1, length // GROUP_SLOTS) if data_config.packing else 1
    return Frame(length, groups, VALUES[reads], members, ends)


class RowStream:
    """The batches of a stream, one after another.

    Args:
      spool: gives its lines.
      tokenizer: of the model.
      data_config: the `data` section of a config; see `build_dataset`.
      vocab_size: the rows of the model's embedding.
      reads: the kind of rows that the task wants; see `groups`.
      frame: of every batch.
      rows: of a batch.

    Attributes:
      end: how many batches there are, once the last one was given.
      fault: what is wrong with the rows that come next: they give no batch.
      place: where the lines end that the batches so far are made of.
    """

    def __init__(
        self,
        spool: Spool,
        tokenizer: Tokenizer,
        data_config: Any,
        *,
        vocab_size: int,
        reads: str,
        frame: Frame,
        rows: int,
    ):
        self.spool, self.frame, self.rows = spool, frame, rows
        self.reads, self.vocab_size = reads, vocab_size
        self.report = DataReport(spool.source, "train", data_config.max_length)
        self.how = Encoding(tokenizer, data_config, self.report, Notes())
        has_template = tokenizer.template is not None
        window = window_of(data_config)
        self._joiner = Joiner(window, has_template, reads, self.report)
        self._lengths: Counter[int] = Counter()
        self._given = 0
        self._batches = self._packed()
        self.end: int | None = None
        self.fault: UserError | None = None
        self.place = Place()

    def batch(self, step: int) -> Batch | None:
        """Batch `step`, those before it passed over; None where there is none.

        There is none after the end, where a row is at fault, and where the run is to
        stop while it waits.
        """
        if step < self._given:
            raise ValueError(f"batch {step} of a stream is over")
        if self.fault is not None or (self.end is not None and step >= self.end):
            return None
        try:
            while self._given <= step:
                packed = next(self._batches)
                self._given += 1
        except (HaltedError, StopIteration):
            return None
        except UserError as error:
            self.fault = error
            return None
        return self.frame.arrays(packed, self.rows)

    def text(self) -> str:
        """The account of the rows so far, for the console."""
        report, sizes = self.report, sorted(self._lengths.items())
        counts = [count for _, count in sizes]
        report.lengths = np.repeat([size for size, _ in sizes], counts).astype(np.int64)
        report.warnings = list(self.how.notes.lines())
        return report.text()

    def _packed(self) -> Iterator[list[list[Any]]]:
        """The groups of each row of each batch."""
        chosen, room = self._empty()
        for (group, examples), place in self._encoded():
            needed = sum(slots(example, self.frame.ends) for example in examples)
            row = self._row(chosen, room, needed)
            if row is None:
                self.place = place
                yield chosen
                (chosen, room), row = self._empty(), 0
            chosen[row].append((group.values, examples))
            room[row] -= needed
            self._account(group, examples)
        if not any(chosen):
            raise nothing_left(self.report, self.spool.source)
        self.place, self.end = self.spool.taken, self._given + 1
        yield chosen

    def _empty(self) -> tuple[list[list[Any]], list[int]]:
        return [[] for _ in range(self.rows)], [self.frame.length] * self.rows

    def _row(self, chosen: list[list[Any]], room: list[int], needed: int) -> int | None:
        """The first row with room."""
        for row, (groups, left) in enumerate(zip(chosen, room, strict=True)):
            if needed <= left and len(groups) < self.frame.most:
                return row
        return None

    def _encoded(self) -> Iterator[tuple[Encoded, Place]]:
        """Each group, and the place after the line that made it ready."""
        rows, over = self._rows(), False
        while not over:
            chunk: list[tuple[Group, Place]] = []
            fault: UserError | None = None
            try:
                over = self._collect(rows, chunk)
            except UserError as error:
                fault = error  # after the good rows before it
            places = {id(group): place for group, place in chunk}
            for found in encode_chunk([group for group, _ in chunk], self.how):
                check_ids(found[1], self.vocab_size)
                yield found, places[id(found[0])]
            if fault is not None:
                raise fault

    def _collect(self, rows: Iterator[Row], chunk: list[tuple[Group, Place]]) -> bool:
        """Fills a chunk, without waiting for a line while it has any group.

        Returns:
          whether the rows are over.
        """
        for row in rows:
            for group in self._ready(row):
                chunk.append((group, self.spool.taken))
            if chunk and (len(chunk) >= CHUNK or not self.spool.more):
                return False
        chunk.extend((group, self.spool.taken) for group in self._joiner.rest())
        return True

    def _ready(self, row: Row) -> list[Group]:
        how = self.how
        return read_row(row, self._joiner, self.report, how.notes, how.skip)

    def _rows(self) -> Iterator[Row]:
        skipped: list[tuple[str, str]] = []
        twice: list[tuple[str, str]] = []
        faults = Faults(self.how.skip, skipped)
        for values, where in objects(
            self.spool.lines(), self.spool.shown, faults, twice
        ):
            self._note(skipped, twice)
            yield Row(values, where)
        self._note(skipped, twice)

    def _note(
        self, skipped: list[tuple[str, str]], twice: list[tuple[str, str]]
    ) -> None:
        """Counts what the reading of lines passed over since the last row."""
        self.report.read += len(skipped)
        for where, reason in skipped:
            self.report.skip(reason, where)
        for where, key in twice:
            self.how.notes.add(f"a key twice, such as `{key}`: the last counts", where)
        skipped.clear()
        twice.clear()

    def _account(self, group: Group, examples: tuple[enc.Example, ...]) -> None:
        report = self.report
        report.kept += 1
        for name in KINDS if self.reads == "mixed" else ():
            number = int(group.values.get(name, 0))
            report.kinds[name] = report.kinds.get(name, 0) + number
        for example in examples:
            self._lengths[len(example.ids)] += 1
            report.tokens += len(example.ids)
            report.trained += int(example.trained.sum())
            report.truncated += example.lost > 0
            report.lost += example.lost
