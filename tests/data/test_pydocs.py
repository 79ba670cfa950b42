"""The data that ships: always the same, split by module, nothing in both splits."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from ftjax.data import pydocs
from ftjax.data.prose import paragraphs, strip_signatures
from ftjax.data.pydoc_source import entries, family_of, split_of
from tests.conftest import ROOT

BOTH = [(kind, split) for kind in pydocs.KINDS for split in pydocs.SPLITS]


def strings(row: dict[str, Any]) -> list[str]:
    """Every text of a row, whatever its columns."""
    found = []
    for value in row.values():
        messages = value if isinstance(value, list) else [{"content": value}]
        found += [message["content"] for message in messages]
    return found


def answers(split: str) -> set[str]:
    rows = pydocs.rows("instructions", split)
    return {row["messages"][1]["content"] for row in rows}


@pytest.mark.parametrize(("kind", "split"), BOTH)
def test_rows_have_the_columns_that_trl_takes(kind: str, split: str) -> None:
    roles = {
        "instructions": {"messages": ["user", "assistant"]},
        "preferences": {
            "prompt": ["user"],
            "chosen": ["assistant"],
            "rejected": ["assistant"],
        },
    }
    for row in pydocs.rows(kind, split):
        if kind == "text":
            assert list(row) == ["text"]
        else:
            said = {k: [m["role"] for m in messages] for k, messages in row.items()}
            assert said == roles[kind]
        assert all(text.strip() == text != "" for text in strings(row))


def test_there_are_thousands_of_rows() -> None:
    count = {part: len(list(pydocs.rows(*part))) for part in BOTH}
    assert count["instructions", "train"] > 8000
    assert count["preferences", "train"] > 4000
    assert count["text", "train"] > 1500
    assert all(count[kind, "eval"] > 200 for kind in pydocs.KINDS)


def test_a_small_part_of_the_text_is_held_out() -> None:
    size = {
        split: sum(len(row["text"]) for row in pydocs.rows("text", split))
        for split in pydocs.SPLITS
    }
    assert size["train"] > 1_300_000
    assert 0.04 < size["eval"] / sum(size.values()) < 0.16


def test_the_split_is_by_module_and_the_same_everywhere() -> None:
    """These names are part of the model card: a change makes its numbers untrue."""
    held_out = {"dataclasses", "email", "importlib", "ipaddress", "socket", "ssl"}
    seen = {"asyncio", "builtins", "collections", "json", "math", "os", "pydoc_data"}
    assert {split_of(name) for name in held_out} == {"eval"}
    assert {split_of(name) for name in seen} == {"train"}
    assert family_of("importlib._bootstrap") == "importlib"
    assert family_of("_pydecimal") == family_of("decimal") == "decimal"
    assert family_of("posixpath") == family_of("nt") == "os"


@pytest.mark.parametrize("kind", pydocs.KINDS)
def test_no_text_is_in_both_splits(kind: str) -> None:
    train = {
        part
        for row in pydocs.rows(kind, "train")
        for text in strings(row)
        for part in text.split("\n\n")
    }
    for row in pydocs.rows(kind, "eval"):
        for text in strings(row):
            assert train.isdisjoint(text.split("\n\n"))


def test_no_run_of_twelve_words_is_in_both_splits() -> None:
    def runs(split: str) -> set[tuple[str, ...]]:
        found = set()
        for entry in pydocs.clean_entries(split):
            for text in entry.text:
                words = re.findall(r"\w+", text.lower())
                found |= {tuple(words[i : i + 12]) for i in range(len(words) - 11)}
        return found

    assert runs("train").isdisjoint(runs("eval"))


def test_questions_are_about_their_own_split() -> None:
    for split in pydocs.SPLITS:
        families = {e.family for e in pydocs.clean_entries(split)}
        assert {split_of(family) for family in families} == {split}
        for row in pydocs.rows("instructions", split):
            for name in re.findall(r"`([a-z]\w*)\.", row["messages"][0]["content"]):
                known = name in sys.stdlib_module_names
                assert not known or split_of(family_of(name)) == split


def test_no_paragraph_is_told_twice() -> None:
    for split in pydocs.SPLITS:
        told = Counter(t for e in pydocs.clean_entries(split) for t in e.text)
        assert told.most_common(1)[0][1] == 1


def test_the_rejected_answer_is_another_one() -> None:
    for split in pydocs.SPLITS:
        known = answers(split)
        for row in pydocs.rows("preferences", split):
            chosen, rejected = row["chosen"][0], row["rejected"][0]
            assert chosen["content"] != rejected["content"]
            assert {chosen["content"], rejected["content"]} <= known


def test_the_rejected_answer_is_of_another_kind_of_thing() -> None:
    """Where the module documents things of several kinds, which most do."""
    for split in pydocs.SPLITS:
        kinds = {entry.text[0]: entry.kind for entry in pydocs.clean_entries(split)}
        pairs = [
            [kinds[row[side][0]["content"]] for side in ("chosen", "rejected")]
            for row in pydocs.rows("preferences", split)
        ]
        assert np.mean([one != other for one, other in pairs]) > 0.9


def test_two_processes_make_the_same_rows() -> None:
    """Nor does the order of a set, which differs from process to process, matter."""
    script = (
        "import hashlib, json\nfrom ftjax.data import pydocs\n"
        "digest = hashlib.sha256()\n"
        "for kind in pydocs.KINDS:\n"
        "    for row in pydocs.rows(kind, 'eval'):\n"
        "        digest.update(json.dumps(row).encode())\n"
        "print(digest.hexdigest())\n"
    )
    here = hashlib.sha256()
    for kind in pydocs.KINDS:
        for row in pydocs.rows(kind, "eval"):
            here.update(json.dumps(row).encode())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == here.hexdigest()


def test_well_known_things_are_asked_about_in_several_ways() -> None:
    asked = [row["messages"] for row in pydocs.rows("instructions", "train")]
    dumps = [m for m in asked if "`json.dumps`" in m[0]["content"]]
    assert len({question["content"] for question, _ in dumps}) == 2
    assert {answer["content"] for _, answer in dumps} == {
        "Serialize `obj` to a JSON formatted `str`."
    }
    openings = Counter(m[0]["content"].split("`")[0] for m in asked)
    assert sum(count > 100 for count in openings.values()) >= 15


def test_every_kind_of_thing_is_there() -> None:
    kinds = Counter(entry.kind for entry in entries())
    assert set(kinds) == set(pydocs._QUESTIONS)
    assert min(kinds.values()) > 50


def test_an_unknown_part_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"instruction\[train\].*text\[eval\]"):
        next(pydocs.rows("instruction", "train"))


@pytest.mark.parametrize(
    ("doc", "first", "kept"),
    [
        ("Return the sine of x.", True, ["Return the sine of x."]),
        ("Return the\n    current time", True, ["Return the current time."]),
        ("f(x) -> int\n\nReturn the size.", True, ["Return the size."]),
        (
            "f(x[, y]) -- Do it well.\n\n>>> f(1)\n2",
            True,
            ["Do it well."],
        ),
        (
            "x = 1\ny = 2\n\nThis is only the second.",
            False,
            ["This is only the second."],
        ),
        (
            "Do what is asked.  For example::\n\n    def f(): pass\n\nIt is then done.",
            True,
            ["Do what is asked.", "It is then done."],
        ),
        (
            "Open it.\n\nArgs:\n  mode: How the file is to be opened.\n  size -- bytes",
            True,
            ["Open it.", "`mode`: How the file is to be opened."],
        ),
        (
            "See :class:`~a.Thing` and ``None`` for what it means.",
            True,
            ["See `a.Thing` and `None` for what it means."],
        ),
        ("Name     Meaning\nread     may be read", False, []),
        ("", False, []),
    ],
)
def test_prose_is_kept_and_the_rest_dropped(
    doc: str, first: bool, kept: list[str]
) -> None:
    assert paragraphs(doc) == (first, kept)


@pytest.mark.parametrize(
    ("doc", "rest"),
    [
        ("range(stop) -> range object\nrange(a, b) -> range object\n\nIt.", "It."),
        ("f(a=(1, 2)) -> None: nothing", ""),
        ("D.pop(k) -> v.  Remove it.", "Remove it."),
        ("D.get(k) -> v, look up the key.", "look up the key."),
        ("D.items() -> a set-like object of items.", "a set-like object of items."),
        ("open() is a function.", "open() is a function."),
    ],
)
def test_signatures_are_cut(doc: str, rest: str) -> None:
    assert strip_signatures(doc) == rest
