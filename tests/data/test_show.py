"""What is shown: examples, safe texts, lengths."""

import numpy as np

from ftjax.data.encode import Example
from ftjax.data.report import histogram
from ftjax.data.schema import PromptCompletion, TextRow
from ftjax.data.show import GREEN, RESET, show_example
from ftjax.data.words import clip, visible
from tests.data.conftest import example_of


def test_trained_tokens_stand_in_brackets(plain):
    sample = PromptCompletion("question:", " the answer\n", "d.jsonl:3")
    example = example_of(sample, plain)
    shown = show_example(example, plain, colour=False)
    head, _, body = shown.partition("\n")
    assert head.startswith("d.jsonl:3: ") and "trained on" in head
    assert body == "question:[[ the answer\n</s>]]"


def test_trained_tokens_are_green(plain):
    sample = PromptCompletion("question:", " answer", "d.jsonl:3")
    example = example_of(sample, plain)
    shown = show_example(example, plain, colour=True)
    assert f"{GREEN} answer</s>{RESET}" in shown


def test_colours_only_where_they_are_wanted(plain, capsys):
    example = example_of(TextRow("the answer", "d:1"), plain)
    assert "\x1b" not in show_example(example, plain)  # captured: not a terminal


def test_terminal_escapes_are_shown_not_sent(plain):
    sample = TextRow("a\x1b[2J\x9b1m\u202eb\x07", "d:1")
    example = example_of(sample, plain)
    shown = show_example(example, plain, colour=False)
    assert "\\x1b[2J\\x9b1m\\u202eb\\x07" in shown
    assert not any(c in shown for c in "\x1b\x9b\u202e\x07")


def test_characters_of_several_tokens_stay_whole(plain):
    text = "\U0001f469\u200d\U0001f4bb \u05d0"
    example = example_of(TextRow(text, "d:1"), plain)
    assert visible(text) == text
    halves = Example(example.ids, np.ones(len(example.ids), bool), "d:1")
    assert text in show_example(halves, plain, colour=False)


def test_clip():
    assert clip("a\nb\tc\x1b") == "a\\nb\\tc\\x1b"
    assert clip("x" * 100, 10) == "xxxxxxx..."
    assert clip(["\x1b"]) == "['\\x1b']"


def test_histogram():
    picture = histogram([1] * 100 + [50] + [100] * 10)
    assert picture.startswith("1 |") and picture.endswith("| 100")
    assert picture.count("▁") == 2 and "█" in picture  # even one row shows
    assert histogram([7, 7]) == "all 7"
