"""Rows to groups of examples, and the account of each: what files and streams share."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from ftjax.data import encode as enc
from ftjax.data.groups import Encoded, Group, same_prompt
from ftjax.data.joins import WINDOW, Joiner
from ftjax.data.notes import Notes
from ftjax.data.report import DataReport, Tally
from ftjax.data.schema import Conversation, PromptRow, Sample
from ftjax.data.sources import Row
from ftjax.data.tokenizer import Tokenizer
from ftjax.errors import UserError

CHUNK = 1024  # rows that are rendered and encoded together
BEYOND = "the rejected answer has the higher score"


@dataclass
class Encoding:
    """How groups are encoded, and who is told what became of them."""

    tokenizer: Tokenizer
    config: Any  # the `data` section
    report: DataReport
    notes: Notes

    @property
    def skip(self) -> bool:
        return self.config.on_bad_row == "skip"

    @property
    def rules(self) -> enc.Rules:
        return enc.Rules(
            max_length=self.config.max_length,
            overlong="split" if self.config.join else self.config.overlong,
            completion_only=self.config.completion_only,
            empty_completion=self.config.empty_completion,
            sized=self.report.split == "eval",
        )


def window_of(data_config: Any) -> int:
    """Rows that half a pair waits for the other; commands without a config say none."""
    return getattr(data_config, "join_window", WINDOW)


def read_all(
    rows: Iterable[Row],
    joiner: Joiner,
    report: DataReport,
    notes: Notes,
    skip: bool,
) -> Iterator[Group]:
    """The groups of all rows, in the order in which they are ready.

    Raises:
      UserError: a bad row, unless it is to be skipped.
    """
    for row in rows:
        yield from read_row(row, joiner, report, notes, skip)
    yield from joiner.rest()


def read_row(
    row: Row, joiner: Joiner, report: DataReport, notes: Notes, skip: bool
) -> list[Group]:
    """The groups that are ready by a row; see `read_all`."""
    report.read += 1
    ready = list(joiner.next_row())
    try:
        first, found = joiner.read(row)
    except UserError as error:
        if not skip:
            raise
        report.skip(error.what, str(error.where))
        return ready
    report.schemas.setdefault(first.schema, Tally()).add(row.where)
    report.conversations += _is_chat(first.samples[0])
    if first.identical:
        report.identical.add(row.where)
    for column in first.ignored:
        report.ignored.setdefault(column, Tally()).add(row.where)
    if first.ahead == 0:
        report.drop(enc.TIE, row.where)
        return ready
    if first.identical and joiner.reads == "rated":
        report.drop(enc.SAME, row.where)
        return ready
    if first.ahead is not None and first.ahead < 0:
        notes.add(BEYOND, row.where)
    return ready + found


def _is_chat(sample: Sample) -> bool:
    return isinstance(sample, Conversation) or (
        isinstance(sample, PromptRow) and not isinstance(sample.prompt, str)
    )


def encoded(groups: Iterator[Group], how: Encoding) -> Iterator[Encoded]:
    """The groups of which no member is left out, many encoded at once."""
    while chunk := list(islice(groups, CHUNK)):
        yield from encode_chunk(chunk, how)


def encode_chunk(chunk: Sequence[Group], how: Encoding) -> Iterator[Encoded]:
    """As `encoded`; how groups are cut into chunks changes nothing about them."""
    samples = [sample for group in chunk for sample in group.samples]
    outcomes = iter(enc.encode_all(samples, how.tokenizer, how.rules, how.notes))
    for group in chunk:
        made = [next(outcomes) for _ in group.samples]
        if examples := _kept(made, how):
            yield group, examples


def _kept(outcomes: list[enc.Outcome], how: Encoding) -> tuple[enc.Example, ...]:
    """The examples of a group; none where one of its members is left out."""
    kept = []
    for outcome in outcomes:
        if isinstance(outcome, enc.Example):
            kept.append(outcome)
        elif isinstance(outcome, enc.Dropped):
            how.report.drop(outcome.reason, outcome.where)
            return ()
        elif how.skip:
            how.report.skip(outcome.what, str(outcome.where))
            return ()
        else:
            raise outcome
    if len(kept) == 2 and not _differ(kept, how):
        return ()
    return tuple(kept)


def _differ(pair: list[enc.Example], how: Encoding) -> bool:
    """Whether the sides of a pair differ, in what the model sees of them."""
    chosen, rejected = pair
    if np.array_equal(chosen.ids, rejected.ids):
        cut = chosen.lost or rejected.lost
        how.report.drop(enc.SAME_CUT if cut else enc.SAME, chosen.where)
        return False
    if not same_prompt((chosen, rejected)):
        how.notes.add(
            "the sides of a pair differ within a token of the prompt", chosen.where
        )
    return True


def check_ids(examples: Iterable[enc.Example], vocab_size: int) -> None:
    """Every id must have a row in the embedding.

    Raises:
      UserError: one has none; names its row and its place.
    """
    for example in examples:
        if example.ids.min() < 0 or example.ids.max() >= vocab_size:
            bad = (example.ids < 0) | (example.ids >= vocab_size)
            place = int(bad.argmax())
            raise UserError(
                "a token id is outside the model's vocabulary",
                where=f"{example.where}, token {place}",
                expected=f"0 to {vocab_size - 1:,}",
                got=str(int(example.ids[place])),
                fix="use the tokenizer that belongs to the model",
            )
