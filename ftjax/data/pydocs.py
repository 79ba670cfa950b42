"""The data that ships: rows made of the documentation of the running interpreter.

`pydoc:instructions[train]` and its kin name them as data sources. Nothing is downloaded
and nothing is random: the rows are a function of the Python that runs. Whole modules go
to one side of the split, and whatever train shares with eval is dropped from train: a
paragraph, or any run of twelve words.
"""

import functools
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from ftjax.data.pydoc_source import Entry, entries, split_of

KINDS = ("instructions", "text", "preferences")
SPLITS = ("train", "eval")

_SHARED_RUN = 12  # words; a longer run in both splits counts as a leak
_DOCUMENT = 1400  # characters of a text row, about 350 tokens
_ANSWER = (12, 480)  # characters of an answer, at least and at most

_QUESTIONS = {
    "function": (
        "What does `{name}` do?",
        "What is `{name}` for?",
        "Explain `{name}`.",
        "In Python, what does the function `{name}` do?",
        "What happens when I call `{name}`?",
        "Describe the function `{short}` of the module `{owner}`.",
        "I found `{name}` in some code. What does it do?",
        "Tell me about the function `{name}`.",
        "How would you describe `{name}` in a sentence or two?",
        "What does the documentation say about `{name}`?",
    ),
    "method": (
        "What does `{name}` do?",
        "What is `{name}` for?",
        "Explain the method `{name}`.",
        "What does the method `{short}` of `{owner}` do?",
        "What happens when I call `{name}`?",
        "Describe `{name}`.",
        "I found `{name}` in some code. What does it do?",
        "Given an instance of `{owner}`, what does `{short}` do?",
        "How would you describe `{name}` in a sentence or two?",
        "What does the documentation say about `{name}`?",
    ),
    "attribute": (
        "What is `{name}`?",
        "What does `{name}` hold?",
        "Explain the attribute `{name}`.",
        "What does the attribute `{short}` of `{owner}` tell me?",
        "Describe `{name}`.",
        "What is `{name}` for?",
        "What does the documentation say about `{name}`?",
        "I found `{name}` in some code. What is it?",
    ),
    "class": (
        "What is `{name}`?",
        "What is the class `{name}` for?",
        "Explain the class `{name}`.",
        "What does the class `{name}` represent?",
        "Describe `{name}`.",
        "When would I use `{name}`?",
        "I found `{name}` in some code. What is it?",
        "Tell me about the class `{name}`.",
        "What does the documentation say about `{name}`?",
    ),
    "exception": (
        "What is `{name}`?",
        "What does the exception `{name}` mean?",
        "When is `{name}` raised?",
        "My program raised `{name}`. What is it?",
        "Explain `{name}`.",
        "Describe the exception `{name}`.",
        "What does the documentation say about `{name}`?",
        "I see `{name}` in a traceback. What does it tell me?",
    ),
    "module": (
        "What is the module `{name}` for?",
        "What does the module `{name}` do?",
        "What is in the module `{name}`?",
        "Describe the module `{name}`.",
        "When would I import `{name}`?",
        "Explain the Python module `{name}`.",
        "Tell me about `{name}`.",
        "What does the documentation say about the module `{name}`?",
    ),
    "topic": (
        "What does the language reference say about {title}?",
        "Explain {title} in Python.",
        "Tell me about {title}.",
        "I am learning Python. What should I know about {title}?",
        "Give me a short introduction to {title} in Python.",
        "How does Python define {title}?",
        "Describe {title} in Python.",
        "What do Python's documents say about {title}?",
    ),
}


def rows(kind: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows of one kind and split, always the same and in the same order.

    The order mixes the modules, so that the first rows are a fair sample of all.

    Args:
      kind: 'instructions' (column `messages`), 'text' (column `text`) or 'preferences'
        (columns `prompt`, `chosen` and `rejected`, each a list of messages).
      split: 'train' or 'eval'.

    Raises:
      ValueError: if there is no such kind or split.
    """
    if kind not in KINDS or split not in SPLITS:
        known = [f"{k}[{s}]" for k in KINDS for s in SPLITS]
        raise ValueError(f"no rows {kind}[{split}]; known: {', '.join(known)}")
    make = {"instructions": _instructions, "text": _text, "preferences": _preferences}
    yield from make[kind](split)


@functools.cache
def clean_entries(split: str) -> tuple[Entry, ...]:
    """The entries of a split, each paragraph once, none shared with the other split."""
    seen: set[str] = set()
    barred: set[tuple[str, ...]] = set()
    if split == "train":
        for entry in clean_entries("eval"):
            seen.update(map(_folded, entry.text))
            barred.update(run for text in entry.text for run in _runs(text))
    kept = []
    for entry in entries():
        if split_of(entry.family) != split:
            continue
        fresh = []
        for text in entry.text:
            if _folded(text) not in seen and barred.isdisjoint(_runs(text)):
                fresh.append(text)
                seen.add(_folded(text))
        if fresh:
            opens = entry.opens and fresh[0] == entry.text[0]
            same = (entry.name, entry.kind, entry.owner, entry.family)
            kept.append(Entry(*same, opens, tuple(fresh)))
    return tuple(kept)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _folded(text: str) -> str:
    return " ".join(_words(text))


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = _words(text)
    for i in range(len(words) - _SHARED_RUN + 1):
        yield tuple(words[i : i + _SHARED_RUN])


@functools.cache
def _asked(split: str) -> tuple[Entry, ...]:
    """The public entries that can be asked about and have an answer of fair length."""
    low, high = _ANSWER
    return tuple(
        entry
        for entry in clean_entries(split)
        if entry.opens
        and low <= len(entry.text[0]) <= high
        and not any(part.startswith("_") for part in entry.name.split("."))
        and (entry.kind != "topic" or len(entry.name) < 60)
    )


def _number(*parts: str) -> int:
    """A number that depends on the words alone, not on the process."""
    return int(hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8], 16)


def question(entry: Entry, turn: int = 0) -> str:
    """The `turn`-th way to ask about an entry; another entry begins elsewhere."""
    ways = _QUESTIONS[entry.kind]
    if entry.owner == "builtins":
        ways = tuple(way for way in ways if "{owner}" not in way)
    way = ways[(_number(entry.name) + turn * 3) % len(ways)]
    title = entry.name
    if not re.match(r"[A-Z][A-Z\d]|[\"']|[A-Z]\w*[._]", title):
        title = title[0].lower() + title[1:]
    short = entry.name.rpartition(".")[2]
    return way.format(name=entry.name, short=short, owner=entry.owner, title=title)


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _instructions(split: str) -> Iterator[dict[str, Any]]:
    """One row per entry; in train a second one that asks in other words."""
    turns = range(2 if split == "train" else 1)
    asked = [(entry, turn) for turn in turns for entry in _asked(split)]
    asked.sort(key=lambda ask: _number(ask[0].name, f"asked {ask[1]}"))
    for entry, turn in asked:
        ask = _message("user", question(entry, turn))
        yield {"messages": ask + _message("assistant", entry.text[0])}


def _preferences(split: str) -> Iterator[dict[str, Any]]:
    """One row per entry; rejected is an answer that is about something else.

    It is that of the neighbour in the module with the most similar name, of another
    kind where there is one: a small model can tell what a class is from what a call
    does, and cannot know which of two methods does what.
    """
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in _asked(split):
        groups[entry.family].append(entry)
    for entry in sorted(_asked(split), key=lambda e: _number(e.name, "preferred")):
        other = _neighbour(entry, groups[entry.family])
        if other is not None:
            yield {
                "prompt": _message("user", question(entry)),
                "chosen": _message("assistant", entry.text[0]),
                "rejected": _message("assistant", other.text[0]),
            }


def _neighbour(entry: Entry, group: list[Entry]) -> Entry | None:
    """The entry with the most similar name, of another kind first."""
    others = [e for e in group if e.text[0] != entry.text[0]]
    kin = [e for e in others if e.kind != entry.kind] or others
    if not kin:
        return None
    mine = _trigrams(entry.name)

    def likeness(other: Entry) -> tuple[float, str]:
        theirs = _trigrams(other.name)
        return (len(mine & theirs) / len(mine | theirs), other.name)

    return max(kin, key=likeness)


@functools.cache
def _trigrams(name: str) -> frozenset[str]:
    short = f"  {name.rpartition('.')[2].lower()} "
    return frozenset(short[i : i + 3] for i in range(len(short) - 2))


def _text(split: str) -> Iterator[dict[str, Any]]:
    """Documents: a title, then what stands under it, cut between paragraphs."""
    pages: dict[str, list[Entry]] = defaultdict(list)
    for entry in clean_entries(split):
        pages[entry.owner].append(entry)
    for owner, page in sorted(pages.items(), key=lambda item: _number(item[0])):
        lines: list[str] = []
        for entry in page:
            head = "" if entry.name == owner else f"{_label(entry, owner)}: "
            for i, text in enumerate(entry.text):
                line = (head if i == 0 else "") + text
                if lines and sum(map(len, lines)) + len(line) > _DOCUMENT:
                    yield {"text": _document(owner, page[0], lines)}
                    lines = []
                lines.append(line)
        yield {"text": _document(owner, page[0], lines)}


def _label(entry: Entry, owner: str) -> str:
    return entry.name if owner == "builtins" else entry.name.removeprefix(owner + ".")


def _document(owner: str, first: Entry, lines: list[str]) -> str:
    if first.kind == "topic":
        title = owner
    elif first.kind in ("module", "function"):
        title = f"The module {owner}"
    else:
        word = "exception" if owner.endswith(("Error", "Exception")) else "class"
        title = f"The {word} {owner}"
    return "\n\n".join([title, *lines])
