"""A source to examples that are ready to train on, with an account of every row."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftjax.data import encode as enc
from ftjax.data.groups import (
    KINDS,
    MEMBERS,
    VALUES,
    Encoded,
    both_ways,
    mismatched,
    refuse_no_signal,
)
from ftjax.data.joins import Joiner
from ftjax.data.notes import Notes
from ftjax.data.reading import Encoding, check_ids, encoded, read_all, window_of
from ftjax.data.report import DataReport, Tally
from ftjax.data.sources import Row, RowReader, read_rows
from ftjax.data.tokenizer import Tokenizer
from ftjax.data.windows import in_windows, refuse_windows
from ftjax.errors import UserError

DROPPED_SHARE = 0.05  # more rows without room for an answer are worth a warning
IDENTICAL_SHARE = 0.05  # and so are more pairs that are no pairs


@dataclass
class Dataset:
    """Examples and the account of how they came about.

    Attributes:
      examples: in the order of the source.
      hashes: uint64 [groups], equal where two groups have equal ids.
      groups: the examples that belong together, by their indices: one alone, or the
        chosen and the rejected of a pair.
      values: float32, one number per group, by name.
      columns: of each prompt, itself (`prompt`) and whatever else its row says.
      members: of a group, at most.
      ends: rows hold the last token of an example too.
      shared: the prompt of a group stands once, before its members.
    """

    examples: list[enc.Example]
    report: DataReport
    hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    groups: list[tuple[int, ...]] = field(default_factory=list)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    columns: list[dict[str, Any]] = field(default_factory=list)
    members: int = 1
    ends: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        self.groups = self.groups or [(i,) for i in range(len(self.examples))]

    def fingerprint(self) -> str:
        """A hash of every example in order: equal data, equal fingerprint."""
        digest = hashlib.blake2b(digest_size=16)
        for example in self.examples:
            digest.update(len(example.ids).to_bytes(4, "little"))
            digest.update(example.ids.astype("<i4").tobytes())
            digest.update(example.trained.tobytes())
            if example.weights is not None:
                digest.update(example.weights.astype("<f4").tobytes())
        for name, values in self.values.items():
            digest.update(name.encode() + values.tobytes())
        for columns in self.columns:
            digest.update(json.dumps(columns, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @property
    def text_bytes(self) -> float | None:
        """The bytes of text that are trained on, by weight; None: not counted."""
        total = 0.0
        for e in self.examples:
            if e.sizes is None:
                return None
            counts = e.trained if e.weights is None else e.weights
            total += float(np.dot(e.sizes[1:], counts[1:].astype(np.float64)))
        return total


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
      data_config: the `data` section of a config: max_length, overlong, join, split,
        separator, empty_completion, completion_only, on_bad_row, eval_rows,
        join_window.
      vocab_size: the rows of the model's embedding.
      split: 'train' or 'eval': what the data is for, and which part of the shipped data
        is read; for 'eval', `eval_rows` rows spread evenly over the source are kept.
      reads: the kind of rows that the task wants; see `groups`.

    Raises:
      UserError: a bad row (unless they are skipped), a token id outside the vocabulary,
        or nothing left to train on.
    """
    refuse_windows(data_config, reads)
    reader = _reader(source, data_config, split)
    report = DataReport(source, split, data_config.max_length)
    notes = Notes()
    rows: Iterable[Row] = reader
    if split == "eval" and data_config.eval_rows:
        rows = _spread(list(reader), data_config.eval_rows)
    has_template = tokenizer.template is not None
    joiner = Joiner(window_of(data_config), has_template, reads, report)
    how = Encoding(tokenizer, data_config, report, notes)
    kept = list(encoded(read_all(rows, joiner, report, notes, how.skip), how))
    report.kept = len(kept)
    kept = in_windows(kept, data_config, report)
    _take_over(reader, report)
    _check_pairs(report, source)
    if not kept:
        raise nothing_left(report, source)
    data = _gather(kept, report, reads, data_config.max_length)
    if split == "train":
        refuse_no_signal(source, reads, data.values)
    check_ids(data.examples, vocab_size)
    data.hashes = _account(data, report, reads)
    _warn(report, notes, tokenizer, data.examples[0], mixed=reads == "mixed")
    return data


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
    kinds = KINDS if reads == "mixed" else ()
    report.kinds = {name: int(values[name].sum()) for name in kinds}
    return Dataset(
        examples,
        report,
        groups=indices,
        values=values,
        columns=[group.columns for group, _ in kept] if reads == "prompts" else [],
        members=MEMBERS[reads],
    )


def note_overlap(train: Dataset, held_out: Dataset) -> int:
    """Counts held-out rows that are also trained on, and warns in their report."""
    shared = int(np.isin(held_out.hashes, train.hashes).sum())
    if shared:
        held_out.report.warnings.append(
            f"{shared:,} of {len(held_out.hashes):,} rows are also in the training data"
        )
    return shared


def _reader(source: str, data_config: Any, split: str) -> RowReader:
    named = split if source.startswith("pydoc:") else data_config.split or split
    return read_rows(
        source,
        on_bad_row=data_config.on_bad_row,
        split=named,
        separator=data_config.separator,
    )


def _spread(rows: list[Row], count: int) -> list[Row]:
    """`count` rows at equal distances: the head of a file may be all of one kind."""
    if len(rows) <= count:
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]


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
            "every row has the same chosen and rejected text: the pairs carry no "
            "preference",
            where=source,
            got=f"identical: {same}",
            fix="make the pairs again; or delete the worse texts (`rejected_text`, "
            "`rejected`) and imitate the better with configs/sft.py: `text` alone, "
            "or `chosen` renamed to `completion`",
        )
    if same.count > IDENTICAL_SHARE * rows:
        report.warnings.append(
            f"{same.count / rows:.0%} of the rows have the same accepted and rejected "
            "text, which is no preference"
        )


def nothing_left(report: DataReport, source: str) -> UserError:
    use = "train" if report.split == "train" else "evaluate"
    return UserError(
        f"nothing is left to {use} on",
        where=source,
        got=report.counts() if report.read else "no rows at all: the file is empty",
        fix="raise data.max_length"
        if {enc.NO_ROOM, enc.TOO_LONG, enc.SAME_CUT} & set(report.dropped)
        else "check that this is the right file",
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
    report: DataReport,
    notes: Notes,
    tokenizer: Tokenizer,
    first: enc.Example,
    *,
    mixed: bool,
) -> None:
    """What is worth a word of a data set; `mixed` where all kinds of rows are read."""
    warn = report.warnings.append
    no_room = report.dropped.get(enc.NO_ROOM, Tally())
    if no_room.count > DROPPED_SHARE * report.read:
        warn(
            f"{no_room.count / report.read:.0%} of the rows are dropped because the "
            f"prompt alone has {report.max_length:,} tokens or more: raise "
            "data.max_length, if the model has more positions"
        )
    beyond = report.dropped.get(enc.SAME_CUT, Tally())
    if beyond.count > DROPPED_SHARE * report.read:
        warn(
            f"{beyond.count / report.read:.0%} of the pairs are dropped because they "
            f"differ only beyond {report.max_length:,} tokens: raise data.max_length, "
            "if the model has more positions"
        )
    if len(report.schemas) > 1 and not mixed:
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
