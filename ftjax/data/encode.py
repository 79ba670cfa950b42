"""Samples to token ids, with a mark on every token that is trained on.

Which tokens are trained on is decided by position alone, never by id: a pad or an end
that occurs inside a text is a token like any other.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftjax.data import chat
from ftjax.data.schema import (
    Conversation,
    PromptCompletion,
    Sample,
    TextRow,
    TokenRow,
)
from ftjax.data.tokenizer import Tokenizer
from ftjax.errors import UserError

NO_ROOM = "the prompt alone fills max_length"
TOO_LONG = "longer than max_length"
EMPTY = "the completion is empty"
NOTHING = "nothing to train on"
SAME = "accepted and rejected text are the same"
SAME_CUT = "accepted and rejected text are the same up to max_length"


@dataclass(frozen=True)
class Example:
    """One row as the model sees it.

    Attributes:
      ids: int32 [n].
      trained: bool [n], True where the token is predicted and counts in the loss; the
        first token is never predicted.
      where: the place of the row in its source.
      lost: tokens that were cut off at the end to fit max_length.
    """

    ids: np.ndarray
    trained: np.ndarray
    where: str
    lost: int = 0


@dataclass(frozen=True)
class Dropped:
    """A row that is left out, and why."""

    reason: str
    where: str


@dataclass(frozen=True)
class Rules:
    """How rows are cut to size and what is learned of them.

    Args:
      max_length: the most tokens an example may have.
      overlong: 'truncate' keeps the start, 'drop' leaves the row out, 'error' stops.
      completion_only: train on completions and answers only, else on everything.
      empty_completion: 'drop' or 'error'.
    """

    max_length: int
    overlong: str = "truncate"
    completion_only: bool = True
    empty_completion: str = "drop"


@dataclass
class Notes:
    """Oddities that do not stop a run: how many rows, and the first place of each."""

    count: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, note: str, where: str) -> None:
        self.count[note] += 1
        self.first.setdefault(note, where)

    def lines(self) -> Iterator[str]:
        """One sentence for each."""
        for note, count in self.count.items():
            rows = "1 row" if count == 1 else f"{count:,} rows"
            yield f"{rows}: {note} (first {self.first[note]})"


Outcome = Example | Dropped | UserError


@dataclass
class _Ids:
    """Token ids before they are cut; `boundary` is where the training starts."""

    ids: list[int]
    trained: np.ndarray
    boundary: int


def encode(
    sample: Sample,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    overlong: str = "truncate",
    completion_only: bool = True,
    empty_completion: str = "drop",
) -> Example | Dropped:
    """Encodes one sample; see `Rules`. Raises UserError for a fault of the row."""
    rules = Rules(max_length, overlong, completion_only, empty_completion)
    [outcome] = encode_all([sample], tokenizer, rules, Notes())
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def encode_all(
    samples: Sequence[Sample], tokenizer: Tokenizer, rules: Rules, notes: Notes
) -> list[Outcome]:
    """Encodes many samples at once, in order.

    A fault of one row is returned in its place; a fault of the tokenizer or its
    template is raised.
    """
    outcomes: list[Outcome | None] = [_empty(s, rules) for s in samples]
    todo = [(i, s) for i, s in enumerate(samples) if outcomes[i] is None]
    for kind, encoder in _ENCODERS.items():
        mine = [(i, s) for i, s in todo if isinstance(s, kind)]
        made = encoder([s for _, s in mine], tokenizer, notes) if mine else []
        for (i, sample), ids in zip(mine, made, strict=True):
            outcomes[i] = (
                ids
                if isinstance(ids, UserError)
                else _finish(ids, sample.where, rules, kind is TokenRow)
            )
    return [outcome for outcome in outcomes if outcome is not None]


def _empty(sample: Sample, rules: Rules) -> Outcome | None:
    """Sorts out rows with an empty text or answer."""
    if isinstance(sample, TextRow):
        return None if sample.text.strip() else Dropped(NOTHING, sample.where)
    if isinstance(sample, TokenRow):
        return None if sample.ids else Dropped(NOTHING, sample.where)
    if isinstance(sample, PromptCompletion):
        answers = [sample.completion]
    else:
        later = sample.messages[sample.train_from :]
        answers = [m["content"] for m in later if m["role"] == "assistant"]
    if all(answer.strip() for answer in answers):
        return None
    if rules.empty_completion == "error":
        return UserError(
            EMPTY,
            where=sample.where,
            fix="write the answer, or data.empty_completion=drop",
        )
    return Dropped(EMPTY, sample.where)


def _finish(
    made: _Ids, where: str, rules: Rules, ready_made: bool
) -> Example | Dropped | UserError:
    """Applies the length policy and makes the arrays."""
    length, most = len(made.ids), rules.max_length
    if length > most and rules.overlong == "error":
        return UserError(
            "a row is longer than data.max_length",
            where=where,
            expected=f"at most {most:,} tokens",
            got=f"{length:,}",
            fix="raise data.max_length, or data.overlong=truncate or drop",
        )
    if made.boundary >= most:
        return Dropped(NO_ROOM, where)
    if length > most and rules.overlong == "drop":
        return Dropped(TOO_LONG, where)
    trained = made.trained
    if not rules.completion_only and not ready_made:
        trained = np.ones(length, bool)
    trained = trained[:most].copy()
    trained[:1] = False
    if not trained.any():
        return Dropped(NOTHING, where)
    ids = np.array(made.ids[:most], np.int32)
    return Example(ids, trained, where, lost=max(0, length - most))


def _encode_texts(
    rows: Sequence[TextRow], tokenizer: Tokenizer, notes: Notes
) -> list[_Ids | UserError]:
    found: list[_Ids | UserError] = []
    for row, ids in zip(
        rows, tokenizer.encode([r.text for r in rows], add_special=True), strict=True
    ):
        _note_specials(row.text, row.where, tokenizer, notes)
        ids = _with_eos(_single_bos(ids, row.where, tokenizer, notes), tokenizer)
        found.append(_Ids(ids, np.ones(len(ids), bool), 0))
    return found


def _encode_pairs(
    rows: Sequence[PromptCompletion], tokenizer: Tokenizer, notes: Notes
) -> list[_Ids | UserError]:
    """The boundary is the longest common prefix of the prompt's ids and the whole's."""
    texts = [r.prompt for r in rows] + [r.prompt + r.completion for r in rows]
    encoded = tokenizer.encode(texts, add_special=True)
    found: list[_Ids | UserError] = []
    tail = len(tokenizer.added[1])
    for row, prompt, ids in zip(
        rows, encoded[: len(rows)], encoded[len(rows) :], strict=True
    ):
        _note_specials(row.prompt, row.where, tokenizer, notes)
        _note_specials(row.completion, row.where, tokenizer, notes)
        prompt = tokenizer.single_bos(prompt[: len(prompt) - tail])
        ids = _with_eos(_single_bos(ids, row.where, tokenizer, notes), tokenizer)
        boundary = _common(prompt, ids)
        if boundary < len(prompt):
            notes.add("prompt and completion share a token at their border", row.where)
        found.append(_Ids(ids, np.arange(len(ids)) >= boundary, boundary))
    return found


def _encode_chats(
    rows: Sequence[Conversation], tokenizer: Tokenizer, notes: Notes
) -> list[_Ids | UserError]:
    rendered = chat.render_all(
        [(row.messages, row.where, row.train_from) for row in rows], tokenizer
    )
    good = [r for r in rendered if isinstance(r, chat.Rendered)]
    # The template writes the special tokens itself: adding any would double them.
    encoded = iter(tokenizer.encode_spans([r.text for r in good]))
    found: list[_Ids | UserError] = []
    for row, result in zip(rows, rendered, strict=True):
        if isinstance(result, UserError):
            found.append(result)
            continue
        for message in row.messages:
            _note_specials(message["content"], row.where, tokenizer, notes)
        for note in dict.fromkeys(result.notes):
            notes.add(note, row.where)
        ids, offsets = next(encoded)
        trained = _covered(offsets, result.spans)
        boundary = int(trained.argmax()) if trained.any() else len(ids)
        found.append(_Ids(ids, trained, boundary))
    return found


def _encode_ready(
    rows: Sequence[TokenRow], tokenizer: Tokenizer, notes: Notes
) -> list[_Ids | UserError]:
    del tokenizer, notes
    found: list[_Ids | UserError] = []
    for row in rows:
        trained = np.array(row.trained, bool)
        boundary = int(trained.argmax()) if trained.any() else 0
        # JSON has numbers of any size; those that are no ids are found later.
        ids = [min(max(i, -1), 2**31 - 1) for i in row.ids]
        found.append(_Ids(ids, trained, boundary))
    return found


_Encoder = Callable[[list[Any], Tokenizer, Notes], list[_Ids | UserError]]
_ENCODERS: dict[type, _Encoder] = {
    TextRow: _encode_texts,
    PromptCompletion: _encode_pairs,
    Conversation: _encode_chats,
    TokenRow: _encode_ready,
}


def _covered(
    offsets: list[tuple[int, int]], spans: list[tuple[int, int]]
) -> np.ndarray:
    """bool [n]: which tokens have a character in one of the spans."""
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    ends = np.maximum(ends, starts + 1)
    trained = np.zeros(len(starts), bool)
    for start, end in spans:
        trained |= (ends > start) & (starts < end)
    return trained


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i in range(limit) if a[i] != b[i])


def _single_bos(
    ids: list[int], where: str, tokenizer: Tokenizer, notes: Notes
) -> list[int]:
    single = tokenizer.single_bos(ids)
    if len(single) < len(ids):
        notes.add("the text began with BOS itself: one was removed", where)
    return single


def _with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    if tokenizer.eos_id is None or (ids and ids[-1] == tokenizer.eos_id):
        return ids
    return [*ids, tokenizer.eos_id]


def _note_specials(text: str, where: str, tokenizer: Tokenizer, notes: Notes) -> None:
    text = text.removeprefix(tokenizer.bos_text) if tokenizer.bos_text else text
    text = text.removesuffix(tokenizer.eos_text) if tokenizer.eos_text else text
    match = tokenizer.special_pattern.search(text)
    if match:
        notes.add("text holds special tokens, which are encoded as such", where)
