"""A source to a data set, with an account of every row."""

import pytest

from ftjax.data.dataset import build_dataset, note_overlap
from ftjax.data.encode import EMPTY, NO_ROOM, TOO_LONG
from tests.data.conftest import chat_row, data_config, fault_of

PAIR = {"prompt": "question:", "completion": " the answer"}


def build(path, tokenizer, split="train", vocab_size=None, **settings):
    return build_dataset(
        path,
        tokenizer,
        data_config(**settings),
        vocab_size=vocab_size or tokenizer.vocab_size,
        split=split,
    )


def test_every_row_is_accounted_for(write, plain):
    rows = [
        {**PAIR, "source": "x"},
        {"prompt": "q", "completion": ""},
        {"prompt": "z" * 80, "completion": "b"},
        {"prompt": "q", "completion": "z" * 100},
        PAIR,
    ]
    data = build(write(rows), plain)
    report = data.report
    assert (report.read, report.kept, report.dropped_rows) == (5, 3, 2)
    assert report.dropped[EMPTY].places == ["d.jsonl:2"]
    assert report.dropped[NO_ROOM].places == ["d.jsonl:3"]
    assert (report.truncated, report.duplicates) == (1, 1)
    assert list(report.ignored) == ["source"]
    assert report.tokens == sum(len(e.ids) for e in data.examples)
    assert report.trained == sum(e.trained.sum() for e in data.examples)
    shown = report.text()
    for part in ("rows read", "d.jsonl:3", "columns not used", "source", "trained on"):
        assert part in shown
    assert any("raise data.max_length" in w for w in report.warnings)  # 20 % > 5 %


def test_conversations_are_counted(write, chatml):
    rows = [chat_row("q", "a"), PAIR]
    assert build(write(rows), chatml).report.conversations == 1


def test_bad_rows_stop_or_are_skipped_and_listed(write, plain):
    lines = b'{"text": "ok"}\nnonsense\n{"text": 3}\n{"zebra": 1}\n{"text": "ok too"}\n'
    path = write(lines)
    assert fault_of(lambda: build(path, plain)).where == "d.jsonl:2, column 1"
    report = build(path, plain, on_bad_row="skip").report
    assert (report.read, report.kept, report.skipped_rows) == (5, 2, 3)
    assert "d.jsonl:3" in report.text() and "d.jsonl:2, column 1" in report.text()


def test_a_row_that_the_template_refuses_can_be_skipped(write, make_tokenizer):
    tokenizer = make_tokenizer(
        template="{% for m in messages %}{% if m.content == 'bad' %}"
        "{{ raise_exception('no') }}{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    path = write([chat_row("q", "a"), chat_row("bad", "a")])
    assert fault_of(lambda: build(path, tokenizer)).where == "d.jsonl:2"
    assert build(path, tokenizer, on_bad_row="skip").report.skipped_rows == 1


def test_nothing_left_is_an_error_with_counts(write, plain):
    path = write([{"prompt": "z" * 80, "completion": "b"}] * 3)
    error = fault_of(lambda: build(path, plain))
    assert "3 rows read, 0 kept" in error.got and NO_ROOM in error.got
    assert "max_length" in error.fix
    error = fault_of(lambda: build(path, plain, overlong="drop"))
    assert NO_ROOM in error.got or TOO_LONG in error.got
    error = fault_of(lambda: build(write(b""), plain))
    assert "no rows at all" in error.got
    error = fault_of(lambda: build(write(b"\n\n"), plain, split="eval"))
    assert "evaluate" in error.what


def test_ids_outside_the_vocabulary_name_row_and_id(write, plain):
    for ids, shown in (([5, 300], "300"), ([5, -3], "-1")):
        path = write([{"input_ids": [1, 2]}, {"input_ids": ids}])
        error = fault_of(lambda path=path: build(path, plain, vocab_size=300))
        assert error.where == "d.jsonl:2, token 1"
        assert (error.expected, error.got) == ("0 to 299", shown)


def test_mixed_schemas_and_duplicate_keys_are_reported(write, plain):
    lines = b'{"text": "a b"}\n{"prompt": "a", "completion": "b", "prompt": "c"}\n'
    warnings = "\n".join(build(write(lines), plain).report.warnings)
    assert "text at d.jsonl:1, prompt/completion at d.jsonl:2" in warnings
    assert "first `prompt` at d.jsonl:2" in warnings


def test_no_eos_shows_the_first_ids(write, make_tokenizer):
    tokenizer = make_tokenizer(eos=None)
    data = build(write([{"text": "abcdefghijkl"}]), tokenizer)
    [warning] = data.report.warnings
    assert ", ".join(map(str, data.examples[0].ids[:8])) in warning


def test_overlap_and_order(write, plain):
    train = build(write([{"text": f"row {i}"} for i in range(9)]), plain)
    held_out = build(
        write([{"text": f"row {i}"} for i in range(7, 12)], "e.jsonl"),
        plain,
        split="eval",
    )
    assert note_overlap(train, held_out) == 2
    assert "2 of 5 rows" in held_out.report.warnings[-1]
    assert [e.where for e in train.examples[:2]] == ["d.jsonl:1", "d.jsonl:2"]


def test_eval_rows_are_spread_over_the_file(write, plain):
    path = write([{"text": f"row {i}"} for i in range(10)])
    data = build(path, plain, split="eval", eval_rows=3)
    assert [e.where for e in data.examples] == ["d.jsonl:1", "d.jsonl:4", "d.jsonl:7"]
    assert len(build(path, plain, eval_rows=3).examples) == 10


def test_fingerprint_changes_with_the_data(write, plain):
    rows = [{"text": "one"}, {"text": "two"}]
    same = [build(write(rows), plain).fingerprint() for _ in range(2)]
    other = build(write(rows[::-1]), plain).fingerprint()
    assert same[0] == same[1] != other


def test_terminal_escapes_do_not_reach_the_console(write, plain):
    path = write([{"text": "a b", "\x1b]0;title\x07": 1}])
    shown = build(path, plain).report.text()
    assert "\x1b" not in shown and "\\x1b" in shown
    error = fault_of(lambda: build(write([{"\x1b[2J": 1}]), plain))
    assert "\x1b" not in error.screen()


@pytest.mark.parametrize("count", [1, 2, 1500])
def test_sizes_around_a_chunk(write, plain, count):
    data = build(write([{"text": f"row {i}"} for i in range(count)]), plain)
    assert len(data.examples) == count
