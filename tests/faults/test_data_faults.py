"""Bad rows, files, templates and tokenizers, as the commands meet them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli import run_cli
from tests.faults.commands import (
    PAIRS,
    TALK,
    assert_no_run,
    check,
    copy_model,
    edit_json,
    messages,
    options,
    write_rows,
)

EOS = 3  # <|im_end|>, as tests/tiny.py numbers it


def test_a_missing_column_is_named_with_the_nearest(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completoin": "b"}] * 8
    data, workdir = write_rows(tmp_path / "d.jsonl", rows), tmp_path / "run"
    result = run_cli("train", *options(tiny, data, f"--workdir={workdir}"))
    result.refused(
        "d.jsonl:1",
        "`completion` is missing",
        "columns `prompt`, `completoin`",
        "`messages`",
        "rename `completoin` to `completion`",
    )
    assert_no_run(workdir)


def test_an_empty_file_is_no_training_data(tiny: Path, tmp_path: Path) -> None:
    data, workdir = tmp_path / "d.jsonl", tmp_path / "run"
    data.touch()
    result = run_cli("train", *options(tiny, data, f"--workdir={workdir}"))
    result.refused("nothing is left to train on", str(data), "the file is empty")
    assert_no_run(workdir)


def test_rows_that_are_all_dropped_are_counted_by_reason(
    tiny: Path, tmp_path: Path
) -> None:
    empty = [{"prompt": "a", "completion": ""}] * 3
    long = [{"prompt": "a" * 900, "completion": "b"}] * 2
    result = check(tiny, write_rows(tmp_path / "d.jsonl", empty + long))
    result.refused(
        "nothing is left to train on",
        "5 rows read, 0 kept",
        "the completion is empty: 3 (d.jsonl:1",
        "the prompt alone fills max_length: 2 (d.jsonl:4, d.jsonl:5)",
    )


def test_malformed_json_in_the_middle(tiny: Path, tmp_path: Path) -> None:
    lines = [json.dumps(PAIRS[i % 12]) for i in range(60)]
    lines[36] = lines[36][:20]
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(lines) + "\n")
    check(tiny, data).refused(
        "malformed JSON", "d.jsonl:37, column", "data.on_bad_row=skip"
    )
    result = check(tiny, data, "--config.data.on_bad_row=skip").ok()
    assert result.json is not None
    # Those after the bad line are read as well.
    assert (result.json["kept"], result.json["skipped"]) == (59, 1)
    assert "malformed JSON" in result.err and "1 (d.jsonl:37" in result.err


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ([], ("a row is not an object", "got:      a list: []")),
        (None, ("a row is not an object", "got:      null")),
        (
            {"prompt": 3, "completion": "b"},
            ("column `prompt` has the wrong type", "expected: text", "a number: 3"),
        ),
    ],
    ids=["list", "null", "number"],
)
def test_a_cell_of_the_wrong_type(
    row: Any, parts: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "d.jsonl", [PAIRS[0], row, PAIRS[1]])
    check(tiny, data).refused("d.jsonl:2", *parts)


def test_a_file_that_was_cut_off(tiny: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", PAIRS)
    data.write_bytes(data.read_bytes()[:-5])
    check(tiny, data).refused("d.jsonl:12, column", "the file looks truncated")


def test_empty_answers_are_counted_or_refused(tiny: Path, tmp_path: Path) -> None:
    empty = {"prompt": "a", "completion": ""}
    silent = messages(("user", "Hello?"), ("assistant", "  "))
    data = write_rows(tmp_path / "d.jsonl", [*PAIRS, empty, silent])
    result = check(tiny, data).ok()
    assert result.json is not None
    assert result.json["dropped"] == {"the completion is empty": 2}
    assert result.json["kept"] == 12
    assert "2 (d.jsonl:13, d.jsonl:14)" in result.err
    check(tiny, data, "--config.data.empty_completion=error").refused(
        "the completion is empty", "d.jsonl:13", "data.empty_completion=drop"
    )


def test_prompts_that_leave_no_room(tiny: Path, tmp_path: Path) -> None:
    long = {"prompt": "a" * 640, "completion": "b"}
    data = write_rows(tmp_path / "d.jsonl", [*PAIRS, long])
    result = check(tiny, data).ok()
    assert result.json is not None
    assert result.json["dropped"] == {"the prompt alone fills max_length": 1}
    assert any("8% of the rows" in w for w in result.json["warnings"])
    check(tiny, write_rows(data, [long, long])).refused(
        "the prompt alone fills max_length: 2", "raise data.max_length"
    )


def test_rows_with_every_token_masked(tiny: Path, tmp_path: Path) -> None:
    masked = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    good = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    result = check(tiny, write_rows(tmp_path / "d.jsonl", [good, masked, good])).ok()
    assert result.json is not None
    assert result.json["dropped"] == {"nothing to train on": 1}
    assert result.json["trained_tokens"] == 4
    workdir = tmp_path / "run"
    data = write_rows(tmp_path / "e.jsonl", [masked, masked])
    run_cli("train", *options(tiny, data, f"--workdir={workdir}")).refused(
        "nothing is left to train on", "2 rows read, 0 kept", "nothing to train on: 2"
    )
    assert_no_run(workdir)


def test_accepted_and_rejected_that_are_the_same(tiny: Path, tmp_path: Path) -> None:
    same = {"prompt": "a", "text": "a b", "rejected_text": "a b"}
    other = {"prompt": "a", "text": "a b", "rejected_text": "a c"}
    data = write_rows(tmp_path / "d.jsonl", [other] * 9 + [same])
    result = check(tiny, data).ok()
    assert result.json is not None
    assert result.json["identical"] == 1
    assert any("10%" in w and "rejected" in w for w in result.json["warnings"])
    check(tiny, write_rows(data, [same] * 3)).refused(
        "no preference",
        "3 (d.jsonl:1, d.jsonl:2, d.jsonl:3)",
        "rejected_text",
        "`text` alone",
    )


@pytest.mark.parametrize(
    ("turns", "parts"),
    [
        ([("assistant", "a")], ("message 0", "`user` must come first")),
        (
            [("user", "a"), ("user", "b"), ("assistant", "c")],
            ("message 1", "`assistant` must come after `user`"),
        ),
        (
            [("user", "a"), ("narrator", "b")],
            ("message 1", "an unknown role", "narrator"),
        ),
        (
            [("user", "a"), ("system", "b"), ("assistant", "c")],
            ("message 1", "a system message may only be the first"),
        ),
        (
            [("user", "a"), ("assistant", "b"), ("user", "c")],
            ("message 2", "the last message must be the assistant's"),
        ),
        ([], ("a conversation is empty", "at least one message")),
    ],
    ids=["assistant-first", "user-twice", "unknown", "late-system", "no-end", "empty"],
)
def test_roles_out_of_order(
    turns: list[tuple[str, str]], parts: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"messages": TALK}, messages(*turns)])
    check(tiny, data).refused("d.jsonl:2", *parts)


def test_conversations_without_a_chat_template(tiny: Path, tmp_path: Path) -> None:
    model = copy_model(tiny, tmp_path / "model")
    edit_json(model / "tokenizer_config.json", chat_template=...)
    data = write_rows(tmp_path / "d.jsonl", [{"messages": TALK}] * 4)
    check(model, data).refused(
        "the tokenizer has no chat template",
        "d.jsonl:1",
        "data.chat_template",
        "`prompt` and `completion`",
    )
    check(model, write_rows(data, PAIRS)).ok()


TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages[:1] %}" + TURN + "{% endfor %}" + PROMPT,
        "{% for m in messages | reverse %}" + TURN + "{% endfor %}" + PROMPT,
    ],
    ids=["drops", "reorders"],
)
def test_a_template_that_loses_turns(template: str, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "odd.jinja"
    file.write_text(template)
    data = write_rows(tmp_path / "d.jsonl", [{"messages": TALK}] * 4)
    check(tiny, data, f"--config.data.chat_template={file}").refused(
        "drops, changes or reorders turns", "d.jsonl:1", "Say one.", "{% generation %}"
    )


def test_a_template_without_generation_marks_trains_the_same_tokens(
    tiny: Path, tmp_path: Path
) -> None:
    file = tmp_path / "plain.jinja"
    file.write_text(
        "{{ bos_token }}{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
    )
    data = write_rows(tmp_path / "d.jsonl", [{"messages": TALK * 2}] * 4)
    marked = check(tiny, data).ok().json
    found = check(tiny, data, f"--config.data.chat_template={file}").ok().json
    assert marked is not None and found is not None
    for key in ("tokens", "trained_tokens"):
        assert found[key] == marked[key] > 0


def test_pads_do_not_matter(tiny: Path, tmp_path: Path) -> None:
    """No pad, or one that is the end token: the end of an answer is trained on."""
    rows = [*PAIRS, {"messages": TALK}, {"text": "Some text."}]
    data = write_rows(tmp_path / "d.jsonl", rows)
    usual = check(tiny, data, "--rows=1").ok()
    assert usual.json is not None
    assert "[[ It is 0.<|im_end|>]]" in usual.err
    for name, pad in (("none", ...), ("eos", "<|im_end|>")):
        model = copy_model(tiny, tmp_path / name)
        edit_json(model / "tokenizer_config.json", pad_token=pad)
        edit_json(model / "config.json", pad_token_id=... if pad is ... else EOS)
        result = check(model, data, "--rows=1").ok()
        assert result.json is not None
        for key in ("tokens", "trained_tokens", "lengths"):
            assert result.json[key] == usual.json[key]
        assert "[[ It is 0.<|im_end|>]]" in result.err


def test_no_end_token_is_told_with_the_first_ids(tiny: Path, tmp_path: Path) -> None:
    model = copy_model(tiny, tmp_path / "model")
    edit_json(model / "tokenizer_config.json", eos_token=..., bos_token=...)
    data = write_rows(tmp_path / "d.jsonl", [{"text": "abc"}] * 4)
    result = check(model, data).ok()
    assert result.json is not None
    [warning] = (w for w in result.json["warnings"] if "no end-of-text" in w)
    assert "first ids: 1, " in warning


def test_a_doubled_bos_is_removed(tiny: Path, tmp_path: Path) -> None:
    plain = write_rows(tmp_path / "plain.jsonl", [{"text": "abc"}] * 4)
    double = write_rows(tmp_path / "double.jsonl", [{"text": "<|bos|>abc"}] * 4)
    usual, found = check(tiny, plain).ok().json, check(tiny, double).ok().json
    assert usual is not None and found is not None
    assert found["tokens"] == usual["tokens"]
    assert any("one was removed" in w and "4 rows" in w for w in found["warnings"])


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (
            {"input_ids": [5, 100_000]},
            ("outside the model's vocabulary", "token 1", "0 to 270", "100000"),
        ),
        (
            {"input_ids": [5, -7, 9]},
            ("outside the model's vocabulary", "token 1", "got:      -"),
        ),
        (
            {"input_ids": [-100, 5, 6], "labels": [-100, 5, 6]},
            ("outside the model's vocabulary", "token 0", "got:      -"),
        ),
        (
            {"input_ids": [5, 6, 7], "labels": [-100, -1, 7]},
            ("neither its own token nor -100", "labels[1]", "got:      -1"),
        ),
    ],
    ids=["too-large", "negative", "ignore-index", "label"],
)
def test_ids_that_are_no_tokens(
    row: Any, parts: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    good = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    data = write_rows(tmp_path / "d.jsonl", [good, good, row])
    check(tiny, data).refused("d.jsonl:3", *parts)
