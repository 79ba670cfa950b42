"""Oddities of texts that do not stop a run, noticed while they are encoded."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ftjax.data.tokenizer import Tokenizer


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


def single_bos(
    ids: list[int], where: str, tokenizer: Tokenizer, notes: Notes
) -> list[int]:
    """The ids with one token that begins a text, where the text had its own."""
    single = tokenizer.single_bos(ids)
    if len(single) < len(ids):
        notes.add("the text began with BOS itself: one was removed", where)
    return single


def with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The ids, ending with the end of text, where there is such a token."""
    if tokenizer.eos_id is None or (ids and ids[-1] == tokenizer.eos_id):
        return ids
    return [*ids, tokenizer.eos_id]


def note_specials(text: str, where: str, tokenizer: Tokenizer, notes: Notes) -> None:
    """Notes a text that holds special tokens within."""
    text = text.removeprefix(tokenizer.bos_text) if tokenizer.bos_text else text
    text = text.removesuffix(tokenizer.eos_text) if tokenizer.eos_text else text
    match = tokenizer.special_pattern.search(text)
    if match:
        notes.add("text holds special tokens, which are encoded as such", where)
