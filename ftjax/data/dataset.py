"""A source to examples that are ready to train on, with an account of every row."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from ftjax.data import encode as enc
from ftjax.data.groups import (
    MEMBERS,
    VALUES,
    Group,
    both_ways,
    mismatched,
    read_groups,
    refuse_no_signal,
    same_prompt,
)
from ftjax.data.report import DataReport, Tally
from ftjax.data.schema import Conversation
from ftjax.data.sources import Row, RowReader, read_rows
from ftjax.data.tokenizer import Tokenizer
from ftjax.errors import UserError

CHUNK = 1024  # rows that are rendered and encoded together
DROPPED_SHARE = 0.05  # more rows without room for an answer are worth a warning
IDENTICAL_SHARE = 0.05  # and so are more pairs that are no pairs
BEYOND = "the rejected answer has the higher score"


@dataclass
class Dataset:
    """Examples and the account of how they came about.

    Attributes:
      examples: in the order of the source.
      hashes: uint64 [groups], equal where two groups have equal ids.
      groups: the examples that belong together, by their indices: one alone, or the
        chosen and the rejected of a pair.
      values: float32, one number per group, by name.
      members: of a group, at most.
      ends: rows hold the last token of an example too.
    """

    examples: list[enc.Example]
    report: DataReport
    hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    groups: list[tuple[int, ...]] = field(default_factory=list)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    members: int = 1
    ends: bool = False

    def __post_init__(self) -> None:
        self.groups = self.groups or [(i,) for i in range(len(self.examples))]

    def fingerprint(self) -> str:
        """A hash of every example in order: equal data, equal fingerprint."""
        digest = hashlib.blake2b(digest_size=16)
        for example in self.examples:
            digest.update(len(example.ids).to_bytes(4, "little"))
            digest.update(example.ids.astype("<i4").tobytes())
            digest.update(example.trained.tobytes())
        for name, values in self.values.items():
            digest.update(name.encode() + values.tobytes())
        return digest.hexdigest()


def build_dataset(
    source: str,
    tokenizer: Tokenizer,
    data_config: Any,
    *,
    vocab_size: int,
    split: str,
    reads: str = "answers",
) -> Dataset:
    """Reads, checks and encodes a source.

    Args:
      source: see `sources`.
      tokenizer: of the model.
      data_config: the `data` section of a config: max_length, overlong, split,
        empty_completion, completion_only, on_bad_row, eval_rows.
      vocab_size: the rows of the model's embedding.
      split: 'train' or 'eval': what the data is for, and which part of the shipped data
        is read; for 'eval', `eval_rows` rows spread evenly over the source are kept.
      reads: the kind of rows that the task wants; see `groups`.

    Raises:
      UserError: a bad row (unless they are skipped), a token id outside the vocabulary,
        or nothing left to train on.
    """
    reader = read_rows(
        source,
        on_bad_row=data_config.on_bad_row,
        split=_source_split(source, data_config.split, split),
    )
    report = DataReport(source, split, data_config.max_length)
    notes = enc.Notes()
    skip = data_config.on_bad_row == "skip"
    rows: Iterable[Row] = reader
    if split == "eval" and data_config.eval_rows:
        rows = _spread(list(reader), data_config.eval_rows)
    groups = _groups(rows, report, notes, tokenizer.template is not None, skip, reads)
    kept = list(_encoded(groups, tokenizer, data_config, report, notes))
    _take_over(reader, report)
    _check_pairs(report, source)
    if not kept:
        raise _nothing_left(report, source)
    data = _gather(kept, report, reads, data_config.max_length)
    report.kept = len(data.groups)
    if split == "train":
        refuse_no_signal(source, reads, data.values)
    _check_ids(data.examples, vocab_size)
    data.hashes = _account(data, report, reads)
    _warn(report, notes, tokenizer, data.examples[0])
    return data


Encoded = tuple[Group, tuple[enc.Example, ...]]


def _encoded(
    groups: Iterator[Group],
    tokenizer: Tokenizer,
    data_config: Any,
    report: DataReport,
    notes: enc.Notes,
) -> Iterator[Encoded]:
    """The groups of which no member is left out, many encoded at once."""
    rules, skip = _rules(data_config), data_config.on_bad_row == "skip"
    while chunk := list(islice(groups, CHUNK)):
        samples = [sample for group in chunk for sample in group.samples]
        outcomes = iter(enc.encode_all(samples, tokenizer, rules, notes))
        for group in chunk:
            made = [next(outcomes) for _ in group.samples]
            if examples := _kept(made, report, skip, notes):
                yield group, examples


def _gather(
    kept: list[Encoded],
    report: DataReport,
    reads: str,
    most: int,
) -> Dataset:
    """The examples of all groups in one list, and the groups as indices into it."""
    if reads == "rated":
        own = [examples[0] for _, examples in kept]
        pairs = zip(own, mismatched(own, most), strict=True)
        kept = [(group, both) for (group, _), both in zip(kept, pairs, strict=True)]
    examples = [example for _, members in kept for example in members]
    places = iter(range(len(examples)))
    indices = [tuple(next(places) for _ in members) for _, members in kept]
    values = {
        name: np.array([g.values.get(name, 0) for g, _ in kept], np.float32)
        for name in VALUES[reads]
    }
    return Dataset(
        examples, report, groups=indices, values=values, members=MEMBERS[reads]
    )


def _rules(data_config: Any) -> enc.Rules:
    return enc.Rules(
        max_length=data_config.max_length,
        overlong=data_config.overlong,
        completion_only=data_config.completion_only,
        empty_completion=data_config.empty_completion,
    )


def note_overlap(train: Dataset, held_out: Dataset) -> int:
    """Counts held-out rows that are also trained on, and warns in their report."""
    shared = int(np.isin(held_out.hashes, train.hashes).sum())
    if shared:
        held_out.report.warnings.append(
            f"{shared:,} of {len(held_out.hashes):,} rows are also in the training data"
        )
    return shared


def _source_split(source: str, hub_split: str, split: str) -> str:
    return split if source.startswith("pydoc:") else hub_split or split


def _spread(rows: list[Row], count: int) -> list[Row]:
    """`count` rows at equal distances: the head of a file may be all of one kind."""
    if len(rows) <= count:
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]


def _groups(
    rows: Iterable[Row],
    report: DataReport,
    notes: enc.Notes,
    has_template: bool,
    skip: bool,
    reads: str,
) -> Iterator[Group]:
    for row in rows:
        report.read += 1
        try:
            found = read_groups(row, has_template, reads)
        except UserError as error:
            if not skip:
                raise
            report.skip(error.what, str(error.where))
            continue
        first = found[0]
        report.schemas.setdefault(first.schema, Tally()).add(row.where)
        report.conversations += isinstance(first.samples[0], Conversation)
        if first.identical:
            report.identical.add(row.where)
        for column in first.ignored:
            report.ignored.setdefault(column, Tally()).add(row.where)
        if first.ahead == 0:
            report.drop(enc.TIE, row.where)
        elif first.identical and reads == "rated":
            report.drop(enc.SAME, row.where)
        else:
            if first.ahead is not None and first.ahead < 0:
                notes.add(BEYOND, row.where)
            yield from found


def _kept(
    outcomes: list[enc.Outcome], report: DataReport, skip: bool, notes: enc.Notes
) -> tuple[enc.Example, ...]:
    """The examples of a group; none where one of its members is left out."""
    kept = []
    for outcome in outcomes:
        if isinstance(outcome, enc.Example):
            kept.append(outcome)
        elif isinstance(outcome, enc.Dropped):
            report.drop(outcome.reason, outcome.where)
            return ()
        elif skip:
            report.skip(outcome.what, str(outcome.where))
            return ()
        else:
            raise outcome
    if len(kept) == 2 and not _differ(kept, report, notes):
        return ()
    return tuple(kept)


def _differ(pair: list[enc.Example], report: DataReport, notes: enc.Notes) -> bool:
    """Whether the sides of a pair differ, in what the model sees of them."""
    chosen, rejected = pair
    if np.array_equal(chosen.ids, rejected.ids):
        cut = chosen.lost or rejected.lost
        report.drop(enc.SAME_CUT if cut else enc.SAME, chosen.where)
        return False
    if not same_prompt((chosen, rejected)):
        notes.add(
            "the sides of a pair differ within a token of the prompt", chosen.where
        )
    return True


def _take_over(reader: RowReader, report: DataReport) -> None:
    """Adds what the reader passed over."""
    report.read += len(reader.skipped)
    for where, reason in reader.skipped:
        report.skip(reason, where)
    if reader.duplicate_keys:
        where, key = reader.duplicate_keys[0]
        report.warnings.append(
            f"{len(reader.duplicate_keys):,} rows have a key twice (the last counts), "
            f"first `{key}` at {where}"
        )


def _check_pairs(report: DataReport, source: str) -> None:
    """Pairs of which both sides are the same are worth a word, or no pairs at all."""
    same, rows = report.identical, report.read - report.skipped_rows
    if rows and same.count == rows:
        raise UserError(
            "every row has the same accepted and rejected text: the pairs carry no "
            "preference",
            where=source,
            got=f"identical: {same}",
            fix="make the pairs again; or delete the rejected texts, to imitate the "
            "accepted ones with configs/sft.py",
        )
    if same.count > IDENTICAL_SHARE * rows:
        report.warnings.append(
            f"{same.count / rows:.0%} of the rows have the same accepted and rejected "
            "text, which is no preference"
        )


def _nothing_left(report: DataReport, source: str) -> UserError:
    use = "train" if report.split == "train" else "evaluate"
    return UserError(
        f"nothing is left to {use} on",
        where=source,
        got=report.counts() if report.read else "no rows at all: the file is empty",
        fix="raise data.max_length"
        if {enc.NO_ROOM, enc.TOO_LONG, enc.SAME_CUT} & set(report.dropped)
        else "check that this is the right file",
    )


def _check_ids(examples: list[enc.Example], vocab_size: int) -> None:
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


def _account(data: Dataset, report: DataReport, reads: str) -> np.ndarray:
    """Fills in the sums and counts duplicates; returns the hash of each group."""
    # Beside an answer that is rated stands another row's, which was counted there.
    own = [g[:1] if reads == "rated" else g for g in data.groups]
    groups = [[data.examples[i] for i in members] for members in own]
    examples = [example for members in groups for example in members]
    report.lengths = np.array([len(e.ids) for e in examples], np.int64)
    report.tokens = int(report.lengths.sum())
    report.trained = int(sum(e.trained.sum() for e in examples))
    report.truncated = sum(e.lost > 0 for e in examples)
    report.lost = sum(e.lost for e in examples)
    hashes = np.array([_hash(members) for members in groups], np.uint64)
    report.duplicates = len(hashes) - len(np.unique(hashes))
    if torn := both_ways(data.values, hashes):
        report.warnings.append(f"answers that are rated both good and bad: {torn:,}")
    return hashes


def _hash(members: list[enc.Example]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for example in members:
        digest.update(len(example.ids).to_bytes(4, "little"))
        digest.update(example.ids.astype("<i4").tobytes())
    return int.from_bytes(digest.digest(), "little")


def _warn(
    report: DataReport, notes: enc.Notes, tokenizer: Tokenizer, first: enc.Example
) -> None:
    warn = report.warnings.append
    no_room = report.dropped.get(enc.NO_ROOM, Tally())
    if no_room.count > DROPPED_SHARE * report.read:
        warn(
            f"{no_room.count / report.read:.0%} of the rows are dropped because the "
            f"prompt alone has {report.max_length:,} tokens or more: raise "
            "data.max_length"
        )
    beyond = report.dropped.get(enc.SAME_CUT, Tally())
    if beyond.count > DROPPED_SHARE * report.read:
        warn(
            f"{beyond.count / report.read:.0%} of the pairs are dropped because they "
            f"differ only beyond {report.max_length:,} tokens: raise data.max_length"
        )
    if len(report.schemas) > 1:
        seen = ", ".join(
            f"{name} at {t.places[0]}" for name, t in report.schemas.items()
        )
        warn(f"rows of several kinds: {seen}")
    if "AutoTrain" in report.schemas:
        warn("AutoTrain columns: `text` is trained on as a whole, the others not used")
    if tokenizer.eos_id is None:
        ids = ", ".join(map(str, first.ids[:8]))
        warn(
            "the tokenizer has no end-of-text token, so the model will not learn to "
            f"stop; first ids: {ids}"
        )
    if tokenizer.template is not None and tokenizer.template.tells_date:
        warn("the chat template writes today's date: 26 Jul 2024 is used on every day")
    for note, count in notes.count.items():
        rows = "1 row" if count == 1 else f"{count:,} rows"
        warn(f"{rows}: {note} (first {notes.first[note]})")
