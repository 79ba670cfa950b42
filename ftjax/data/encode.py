"""Samples to token ids, with a mark on every token that is trained on.

Which tokens are trained on is decided by position alone, never by id: a pad or an end
that occurs inside a text is a token like any other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftjax.data import chat
from ftjax.data.notes import Notes, note_specials, single_bos, with_eos
from ftjax.data.schema import (
    Conversation,
    PromptCompletion,
    PromptRow,
    Sample,
    TextRow,
    TokenRow,
)
from ftjax.data.text_bytes import token_bytes
from ftjax.data.tokenizer import Tokenizer
from ftjax.errors import UserError

NO_ROOM = "the prompt alone fills max_length"
TOO_LONG = "longer than max_length"
EMPTY = "the completion is empty"
NOTHING = "nothing to train on"
SAME = "chosen and rejected text are the same"
TIE = "both sides of the pair have the same score"
SAME_CUT = "chosen and rejected text are the same up to max_length"


@dataclass(frozen=True)
class Example:
    """One row as the model sees it.

    Attributes:
      ids: int32 [n].
      trained: bool [n], True where the token is predicted and counts in the loss; the
        first token is never predicted.
      where: the place of the row in its source.
      lost: tokens that were cut off at the end to fit max_length.
      weights: float32 [n], how much each trained token counts; None: 1.
      sizes: int32 [n], the bytes of UTF-8 text of each token; None: not counted.
    """

    ids: np.ndarray
    trained: np.ndarray
    where: str
    lost: int = 0
    weights: np.ndarray | None = None
    sizes: np.ndarray | None = None


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
      overlong: 'truncate' keeps the start, 'drop' leaves the row out, 'error' stops;
        'split' keeps rows whole, for `windows` to cut.
      completion_only: train on completions and answers only, else on everything.
      empty_completion: 'drop' or 'error'.
      sized: count the bytes of each token.
    """

    max_length: int
    overlong: str = "truncate"
    completion_only: bool = True
    empty_completion: str = "drop"
    sized: bool = False


Outcome = Example | Dropped | UserError


@dataclass
class _Ids:
    """Token ids before they are cut; `boundary` is where the training starts."""

    ids: list[int]
    trained: np.ndarray
    boundary: int
    weights: np.ndarray | None = None
    sizes: np.ndarray | None = None


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
        own = [sample for _, sample in mine]
        made = encoder(own, tokenizer, notes, rules.sized) if own else []
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
    if isinstance(sample, PromptRow):
        return None
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
    if rules.overlong == "split":
        most = max(most, length + 1)
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
    if made.boundary == length > 0:  # a prompt, of which nothing is trained on
        return Example(np.array(made.ids, np.int32), made.trained, where)
    if length > most and rules.overlong == "drop":
        return Dropped(TOO_LONG, where)
    trained = made.trained
    if not rules.completion_only and not ready_made:
        trained = np.ones(length, bool)
    trained = trained[:most].copy()
    trained[:1] = False
    weights = made.weights
    if weights is not None:
        trained &= weights[:most] > 0
        weights = weights[:most] * trained
    if not trained.any():
        return Dropped(NOTHING, where)
    ids = np.array(made.ids[:most], np.int32)
    sizes = None if made.sizes is None else made.sizes[:most]
    lost = max(0, length - most)
    return Example(ids, trained, where, lost, weights, sizes)


def _encode_texts(
    rows: Sequence[TextRow], tokenizer: Tokenizer, notes: Notes, sized: bool
) -> list[_Ids | UserError]:
    found: list[_Ids | UserError] = []
    encoded = _encode_whole([r.text for r in rows], tokenizer, sized)
    for row, (raw, sizes) in zip(rows, encoded, strict=True):
        note_specials(row.text, row.where, tokenizer, notes)
        ids, sizes = _complete(raw, sizes, row.where, tokenizer, notes)
        found.append(_Ids(ids, np.ones(len(ids), bool), 0, sizes=sizes))
    return found


def _encode_pairs(
    rows: Sequence[PromptCompletion], tokenizer: Tokenizer, notes: Notes, sized: bool
) -> list[_Ids | UserError]:
    """The boundary is the longest common prefix of the prompt's ids and the whole's."""
    prompts = tokenizer.encode([r.prompt for r in rows], add_special=True)
    encoded = _encode_whole([r.prompt + r.completion for r in rows], tokenizer, sized)
    found: list[_Ids | UserError] = []
    tail = len(tokenizer.added[1])
    for row, prompt, (raw, sizes) in zip(rows, prompts, encoded, strict=True):
        note_specials(row.prompt, row.where, tokenizer, notes)
        note_specials(row.completion, row.where, tokenizer, notes)
        prompt = tokenizer.single_bos(prompt[: len(prompt) - tail])
        ids, sizes = _complete(raw, sizes, row.where, tokenizer, notes)
        boundary = _common(prompt, ids)
        if boundary < len(prompt):
            notes.add("prompt and completion share a token at their border", row.where)
        trained = np.arange(len(ids)) >= boundary
        found.append(_Ids(ids, trained, boundary, sizes=sizes))
    return found


def _encode_whole(
    texts: list[str], tokenizer: Tokenizer, sized: bool
) -> list[tuple[list[int], np.ndarray | None]]:
    """The ids of each text, and the bytes of each id where these are `sized`."""
    if not sized:
        return [(ids, None) for ids in tokenizer.encode(texts, add_special=True)]
    special = tokenizer.special_ids
    spans = tokenizer.encode_spans(texts, add_special=True)
    return [
        (ids, token_bytes(text, ids, offsets, special))
        for text, (ids, offsets) in zip(texts, spans, strict=True)
    ]


def _complete(
    raw: list[int],
    sizes: np.ndarray | None,
    where: str,
    tokenizer: Tokenizer,
    notes: Notes,
) -> tuple[list[int], np.ndarray | None]:
    """With one BOS at most, and with an EOS; the sizes alike."""
    single = single_bos(raw, where, tokenizer, notes)
    ids = with_eos(single, tokenizer)
    if sizes is not None:
        sizes = sizes[len(raw) - len(single) :]
        sizes = np.pad(sizes, (0, len(ids) - len(single)))
    return ids, sizes


def _encode_chats(
    rows: Sequence[Conversation], tokenizer: Tokenizer, notes: Notes, sized: bool
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
            note_specials(message["content"], row.where, tokenizer, notes)
        for note in dict.fromkeys(result.notes):
            notes.add(note, row.where)
        ids, offsets = next(encoded)
        trained = _covered(offsets, result.spans)
        weights = _weigh(row, offsets, result.spans, notes)
        if weights is not None:
            trained &= weights > 0
        boundary = int(trained.argmax()) if trained.any() else len(ids)
        special = tokenizer.special_ids
        sizes = token_bytes(result.text, ids, offsets, special) if sized else None
        found.append(_Ids(ids, trained, boundary, weights, sizes))
    return found


def _weigh(
    row: Conversation,
    offsets: list[tuple[int, int]],
    spans: list[tuple[int, int]],
    notes: Notes,
) -> np.ndarray | None:
    """The weight of each token, float32 [n]: its turn's, and 1 outside the answers."""
    if row.weights is None:
        return None
    found = np.ones(len(offsets), np.float32)
    turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
    turns = [i for i in turns if i >= row.train_from]
    for i, span in zip(turns, spans, strict=True):
        found[_covered(offsets, [span])] = row.weights[i]
    if any(w > 1 for i, w in enumerate(row.weights) if i not in turns):
        notes.add("a weight of what is no answer to learn has no effect", row.where)
    return found


def _encode_ready(
    rows: Sequence[TokenRow], tokenizer: Tokenizer, notes: Notes, sized: bool
) -> list[_Ids | UserError]:
    del tokenizer, notes, sized
    found: list[_Ids | UserError] = []
    for row in rows:
        trained = np.array(row.trained, bool)
        boundary = int(trained.argmax()) if trained.any() else 0
        # JSON has numbers of any size; those that are no ids are found later.
        ids = [min(max(i, -1), 2**31 - 1) for i in row.ids]
        found.append(_Ids(ids, trained, boundary))
    return found


def _encode_prompts(
    rows: Sequence[PromptRow], tokenizer: Tokenizer, notes: Notes, sizes: bool
) -> list[_Ids | UserError]:
    """A text as it begins a row in training; messages up to the assistant's turn."""
    chats = [row for row in rows if not isinstance(row.prompt, str)]
    rendered = iter(
        chat.render_prompts([(r.prompt, r.where) for r in chats], tokenizer)
    )
    found: list[_Ids | UserError] = []
    for row in rows:
        if isinstance(row.prompt, str):
            note_specials(row.prompt, row.where, tokenizer, notes)
            ids = tokenizer.encode_prompt(row.prompt)
        else:
            text = next(rendered)
            if isinstance(text, UserError):
                found.append(text)
                continue
            ids = tokenizer.encode([text], add_special=False)[0]
        found.append(_Ids(ids, np.zeros(len(ids), bool), len(ids)))
    return found


_Encoder = Callable[[list[Any], Tokenizer, Notes, bool], list[_Ids | UserError]]
_ENCODERS: dict[type, _Encoder] = {
    TextRow: _encode_texts,
    PromptCompletion: _encode_pairs,
    Conversation: _encode_chats,
    TokenRow: _encode_ready,
    PromptRow: _encode_prompts,
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
