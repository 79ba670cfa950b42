"""Reading rows: every fault names its file, line and column."""

import gzip
import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ftjax.data import files, tables
from ftjax.data.sources import read_rows
from ftjax.errors import UserError

GOOD = {"prompt": "a", "completion": "b"}


def fault(source, **options):
    with pytest.raises(UserError) as caught:
        list(read_rows(source, **options))
    assert caught.value.code == 2
    return caught.value


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_reads_lines_with_their_numbers(write):
    path = write(b'{"text": "a"}\r\n\r\n{"text": "\xc3\xa9"}\n\n{"text": "c"}')
    rows = list(read_rows(path))
    assert [r.values["text"] for r in rows] == ["a", "\xe9", "c"]
    assert [r.where for r in rows] == ["d.jsonl:1", "d.jsonl:3", "d.jsonl:5"]


def test_a_utf8_mark_is_accepted(write):
    [row] = read_rows(write(b"\xef\xbb\xbf" + lines(GOOD)))
    assert row.values == GOOD


def test_malformed_json_in_the_middle_names_line_and_column(write):
    path = write(lines(GOOD) + b'{"prompt": "a", completion: 3}\n' + lines(GOOD))
    error = fault(path)
    assert error.where == "d.jsonl:2, column 17"
    assert "malformed JSON" in error.what and "truncated" not in error.what


def test_a_cut_last_line_looks_truncated(write):
    error = fault(write((lines(GOOD, GOOD))[:-5]))
    assert "looks truncated" in error.what
    assert str(error.where).startswith("d.jsonl:2, column ")


def test_skipping_goes_on_counts_and_lists(write):
    path = write(lines(GOOD) + b"nonsense\n[]\n" + lines(GOOD))
    reader = read_rows(path, on_bad_row="skip")
    assert [r.where for r in reader] == ["d.jsonl:1", "d.jsonl:4"]
    assert [where for where, _ in reader.skipped] == [
        "d.jsonl:2, column 1",
        "d.jsonl:3",
    ]
    assert len(list(reader)) == 2 and len(reader.skipped) == 2  # not counted twice


@pytest.mark.parametrize(
    "line, kind", [(b"[]", "a list"), (b"null", "null"), (b'"a"', "text")]
)
def test_a_row_must_be_an_object(write, line, kind):
    error = fault(write(line + b"\n"))
    assert error.where == "d.jsonl:1" and error.got.startswith(kind)


def test_latin1_names_the_byte(write):
    error = fault(write(lines(GOOD) + b'{"text": "caf\xe9"}\n'))
    offset = len(lines(GOOD)) + 13
    assert f"d.jsonl:2, byte {offset} of the file" == error.where
    assert error.got == "byte 0xe9"


def test_utf16_and_nul_bytes(write):
    utf16 = '{"text": "a"}\n'.encode("utf-16")
    assert "UTF-16" in fault(write(utf16)).what
    bare = fault(write('{"text": "a"}\n'.encode("utf-16-le")))
    assert "NUL byte" in bare.what and "byte 1 of the file" in str(bare.where)


def test_half_a_character_is_refused(write):
    error = fault(write(b'{"text": "ok \\ud83d\\ude00"}\n{"text": "bad \\ud83d"}\n'))
    assert error.where == "d.jsonl:2, column `text`" and "\\ud83d" in error.got


def test_duplicate_keys_are_reported(write):
    reader = read_rows(write(b'{"text": "a", "text": "b"}\n'))
    assert [row.values for row in reader] == [{"text": "b"}]
    assert reader.duplicate_keys == [("d.jsonl:1", "text")]


def test_deep_nesting_and_huge_numbers(write):
    for bomb in (b'{"a":' + b"[" * 10**5, b'{"a": ' + b"9" * 10**5 + b"}"):
        assert str(fault(write(bomb + b"\n")).where).startswith("d.jsonl:1")


def test_a_huge_line_is_refused_with_bounded_memory(write, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    path = write(lines(GOOD, {"text": "x" * 1000}, GOOD))
    assert "too long" in fault(path).what
    reader = read_rows(path, on_bad_row="skip")
    assert [r.where for r in reader] == ["d.jsonl:1", "d.jsonl:3"]


def test_gzip(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    data = gzip.compress(lines(*[{"text": f"row {i}"} for i in range(5000)]))
    path.write_bytes(data)
    assert len(list(read_rows(str(path)))) == 5000
    path.write_bytes(data[:-500])
    assert "damaged" in fault(str(path)).what
    path.write_bytes(data[:100] + b"\x00\xff\x00\xff" * 20 + data[180:])
    error = fault(str(path))
    assert str(path) in str(error.where) or "d.jsonl.gz" in str(error.where)
    path.write_bytes(lines(GOOD))
    assert "not gzip" in fault(str(path)).what


def test_gzip_without_its_name(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(gzip.compress(lines(GOOD)))
    assert "gzip" in fault(str(path)).what


def test_json_list(write):
    rows = list(read_rows(write(json.dumps([GOOD, GOOD]).encode(), "d.json")))
    assert [r.where for r in rows] == ["d.json:row 1", "d.json:row 2"]
    error = fault(write(b'[{"a": 1},\n {"a" 2}]', "d.json"))
    assert error.where == "d.json, line 2, column 7"
    assert "one list" in fault(write(b'"text"', "d.json")).what
    assert fault(write(b'[{"a": 1}, 3]', "d.json")).where == "d.json:row 2"
    assert "truncated" in fault(write(b'[{"a": "b', "d.json")).what


def test_json_that_holds_lines(write):
    assert len(list(read_rows(write(lines(GOOD, GOOD), "d.json")))) == 2


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD] * 3000), path)
    rows = list(read_rows(str(path)))
    assert len(rows) == 3000 and rows[11].where == "d.parquet:row 12"
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"PAR1" + b"x" * 50, b""):
        path.write_bytes(damaged)
        error = fault(str(path))
        assert "damaged" in error.what and str(path) in str(error.where)


def test_text_files(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text("one\n\ntwo\n")
    assert [(r.values["text"], r.where) for r in read_rows(str(path))] == [
        ("one", "d.txt:1"),
        ("two", "d.txt:3"),
    ]
    path.write_text("a\nb\n<|endoftext|>\nc\n<|endoftext|>\n")
    assert [(r.values["text"], r.where) for r in read_rows(str(path))] == [
        ("a\nb", "d.txt:1"),
        ("c", "d.txt:4"),
    ]


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["d.pkl", "d.pt", "d.npy", "d.bin", "d.jsonl"])
def test_nothing_is_unpickled(tmp_path, name):
    canary = tmp_path / "canary"
    (tmp_path / name).write_bytes(pickle.dumps(_Touch(canary)))
    assert "run code" in fault(str(tmp_path / name)).what
    assert not canary.exists()


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(GOOD))
    error = fault(str(tmp_path / "trian.jsonl"))
    assert "no such data file" in error.what and "train.jsonl" in error.fix


def test_directories_and_unknown_kinds(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    error = fault(str(tmp_path))
    assert "directory" in error.what and "a.jsonl" in error.got
    (tmp_path / "a.csv").write_text("a,b\n")
    assert ".csv" in fault(str(tmp_path / "a.csv")).got
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    assert str(loop) in str(fault(str(loop)).where)


def test_pointers_and_web_pages_are_named(write):
    assert "git-LFS" in fault(write(b"version https://git-lfs.github.com/1\n")).what
    assert "web page" in fault(write(b"<!DOCTYPE html>\n<html>\n")).what


def test_shipped_data(monkeypatch):
    shipped = types.ModuleType("ftjax.data.pydocs")
    shipped.__dict__["rows"] = lambda kind, split: iter([{kind: split}] * 12)
    monkeypatch.setitem(sys.modules, "ftjax.data.pydocs", shipped)
    monkeypatch.setattr("ftjax.data.pydocs", shipped, raising=False)
    rows = list(read_rows("pydoc:text[eval]"))
    assert rows[11].where == "pydoc:text[eval]:row 12"
    assert rows[11].values == {"text": "eval"}
    assert list(read_rows("pydoc:text", split="eval")) == rows
    error = fault("pydoc:instruction[train]")
    assert "instructions" in error.fix


def test_hub_names_offline_end_in_one_message(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr(tables, "_reachable", lambda: False)
    error = fault("someone/no-such-data-set")
    assert "Hub cannot be reached" in error.what
    assert error.where == "someone/no-such-data-set[train]"
    assert "local file" in error.fix and len(error.screen().splitlines()) < 12


def test_hub_rows_know_their_split(monkeypatch):
    monkeypatch.setattr(tables, "_reachable", lambda: True)
    monkeypatch.setattr(
        tables, "_load", lambda repo, subset, split, where, online: [GOOD] * 6
    )
    rows = list(read_rows("owner/name:part[test]"))
    assert rows[4].where == "owner/name:part[test]:row 5"


def test_unreachable_is_found_out_quickly(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert not tables._reachable()
