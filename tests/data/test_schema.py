"""Columns to samples, and what is said where they do not fit."""

import pytest

from ftjax.data.schema import (
    Conversation,
    PromptCompletion,
    TextRow,
    TokenRow,
    normalise,
)
from ftjax.data.sources import Row
from ftjax.errors import UserError
from tests.data.conftest import chat_row


def read(values, **options):
    return normalise(Row(values, "d.jsonl:1"), **options)


def fault(values):
    with pytest.raises(UserError) as caught:
        read(values)
    assert str(caught.value.where).startswith("d.jsonl:1")
    return caught.value


def test_text():
    found = read({"text": "a", "id": 3})
    assert found.sample == TextRow("a", "d.jsonl:1")
    assert found.ignored == ("id",)


def test_prompt_and_completion():
    found = read({"prompt": "a", "completion": "b"})
    assert found.sample == PromptCompletion("a", "b", "d.jsonl:1")


def test_prompt_and_completion_as_messages():
    user = {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": "b"}
    before = [user, answer, user]
    found = read({"prompt": before, "completion": [answer]})
    assert found.sample == Conversation([*before, answer], "d.jsonl:1", train_from=3)
    assert "both" in fault({"prompt": [user], "completion": "b"}).what


def test_messages():
    row = chat_row("a", "b")
    assert read(row).sample == Conversation(row["messages"], "d.jsonl:1")


def test_alpaca():
    row = {
        "instruction": "do",
        "input": "this",
        "output": "done",
        "system": "be kind",
        "history": [["q", "a"]],
    }
    sample = read(row).sample
    assert isinstance(sample, Conversation) and sample.train_from == 3
    assert [m["role"] for m in sample.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert sample.messages[3]["content"] == "do\nthis"
    bare = {"instruction": "do", "input": "", "output": "done"}
    found = read(bare, has_template=False)
    assert found.sample == PromptCompletion("do\n", "done", "d.jsonl:1")
    assert found.schema == "Alpaca"


def test_share_gpt():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    sample = read({"conversations": turns, "system": "s"}).sample
    assert isinstance(sample, Conversation)
    roles = [m["role"] for m in sample.messages]
    assert roles == ["system", "user", "assistant"]
    tool = [*turns, {"from": "observation", "value": "c"}]
    assert "text only" in fault({"conversations": tool}).what


def test_auto_train_uses_text():
    found = read({"prompt": "p", "text": "good", "rejected_text": "bad"})
    assert found.sample == TextRow("good", "d.jsonl:1")
    assert found.schema == "AutoTrain"
    assert found.ignored == ("prompt", "rejected_text")


def test_token_rows():
    found = read({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]})
    assert found.sample == TokenRow([1, 2, 3], [False, True, True], "d.jsonl:1")
    error = fault({"input_ids": [1, 2], "labels": [1, 7]})
    assert error.where == "d.jsonl:1, labels[1]" and "-100" in error.expected
    assert "length" in fault({"input_ids": [1, 2], "labels": [1]}).what
    error = fault({"input_ids": [1, "2"]})
    assert error.where == "d.jsonl:1, input_ids[1]"


def test_a_missing_column_names_what_is_there_and_what_is_near():
    error = fault({"prompt": "a", "completions": "b"})
    assert "`completion` is missing" in error.what
    assert error.got == "columns `prompt`, `completions`"
    assert "rename `completions` to `completion`" in error.fix
    assert "`instruction`, `output`" in error.expected
    assert "rename `Text` to `text`" in fault({"Text": "a"}).fix
    assert "no known columns" in fault({"zebra": 1}).what


@pytest.mark.parametrize(
    "value, got", [(3, "a number: 3"), (None, "null"), (["a"], "a list: ['a']")]
)
def test_a_wrong_type_names_expected_and_got(value, got):
    for row in ({"text": value}, {"instruction": "a", "output": value}):
        error = fault(row)
        assert error.expected == "text" and error.got == got


def test_preference_rows_are_not_for_imitation():
    error = fault({"prompt": "p", "chosen": "a", "rejected": "b"})
    assert "preference" in error.what and "rename `chosen`" in error.fix
    error = fault({"prompt": "p", "completion": "a", "label": False})
    assert "good and bad" in error.what


def test_rows_with_tools_are_refused_by_name():
    error = fault({**chat_row("a", "b"), "tools": [{"name": "f"}]})
    assert "`tools`" in error.what and "text only" in error.what
    assert read({**chat_row("a", "b"), "tools": None}).schema == "messages"


def test_null_columns_of_columnar_files_are_absent():
    found = read({"text": None, "prompt": "a", "completion": "b", "messages": None})
    assert found.schema == "prompt/completion"
