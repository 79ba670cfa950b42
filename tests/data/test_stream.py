"""A stream gives the same batches however its bytes come, killed in between or not."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftjax.data import spool as spools
from ftjax.data.dataset import build_dataset
from ftjax.data.joins import NO_CHOSEN
from ftjax.data.loader import Loader
from ftjax.data.spool import Spool
from ftjax.data.stream import RowStream, stream_frame
from tests.data.conftest import data_config, fault_of
from tests.data.test_joins import bad, good

WAIT = 0.2
ROWS = 3
LENGTH = 16


def rows(count=60):
    """Pairs, halves of pairs, answers and texts of many lengths, in no order."""
    makers = (
        lambda i: {"prompt": f"q{i}", "chosen": " a" * (i % 4 + 1), "rejected": " no"},
        lambda i: {"prompt": f"q{i}", "completion": " yes" * (i % 3 + 1)},
        lambda i: {"text": f"row {i} says" + " more" * (i % 5)},
        lambda i: good(f"h{i // 9}", f" good {i}"),
        lambda i: bad(f"h{i // 9}", f" bad {i}"),
    )
    return [makers[(i * 7 + i // 4) % 5](i) for i in range(count)]


def lines(values):
    return "".join(json.dumps(row) + "\n" for row in values).encode()


def settings(**changes):
    usual = {"max_length": LENGTH, "packing": True, "join_window": 6, "stream": True}
    return data_config(**{**usual, **changes})


def open_stream(
    folder, source, tokenizer, known=None, halted=lambda: False, reads="mixed", **more
):
    folder.mkdir(exist_ok=True)
    config = settings(**more)
    return RowStream(
        Spool(folder, str(source), WAIT, halted, known),
        tokenizer,
        config,
        vocab_size=tokenizer.vocab_size,
        reads=reads,
        frame=stream_frame(config, reads, False),
        rows=ROWS,
    )


def rest(stream: Any, first: int = 0) -> list[Any]:
    """All batches from `first` on."""
    found: list[Any] = []
    while (batch := stream.batch(first + len(found))) is not None:
        found.append(batch)
    return found


def known(stream):
    """What a checkpoint would keep."""
    return stream.place, stream.spool.digest(stream.place)


def same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name, array in a.items():
            np.testing.assert_array_equal(array, b[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, plain):
    """(bytes, batches, report) of a stream that was read in one go."""
    folder = tmp_path_factory.mktemp("whole")
    data = lines(rows())
    (folder / "d.jsonl").write_bytes(data)
    stream = open_stream(folder / "run", folder / "d.jsonl", plain)
    found = rest(stream)
    assert stream.fault is None and stream.end == len(found) > 6
    return data, found, stream.report


def test_every_group_is_there_once_and_in_order(whole, plain, write):
    data, batches, report = whole
    stored = build_dataset(
        write(data),
        plain,
        settings(),
        vocab_size=plain.vocab_size,
        split="train",
        reads="mixed",
    )
    frame = stream_frame(settings(), "mixed", False)
    assert all(b["tokens"].shape == (ROWS, frame.length) for b in batches)
    assert all(b["pair"].shape == (ROWS, frame.most) for b in batches)
    groups = []
    for batch in batches:
        for row in range(ROWS):
            n = int(sum((batch[k][row] > 0).sum() for k in ("pair", "answer", "text")))
            ids = [
                batch["tokens"][row][batch["segments"][row] == s].tolist()
                for s in range(1, 2 * n + 1)
            ]
            groups += [tuple(map(tuple, ids[2 * u : 2 * u + 2])) for u in range(n)]
    expected = [
        tuple(tuple(stored.examples[i].ids[:-1].tolist()) for i in members)
        for members in stored.groups
    ]
    padded = [tuple(g) + ((),) * (2 - len(g)) for g in expected]
    assert sorted(groups) == sorted(padded)
    for name in ("read", "kept", "joined", "imitated", "kinds", "tokens", "trained"):
        assert getattr(report, name) == getattr(stored.report, name), name
    assert report.dropped[NO_CHOSEN].count == stored.report.dropped[NO_CHOSEN].count


def test_one_group_a_row_is_a_file_in_its_order(plain, write):
    data = lines(rows(30))
    path = write(data)
    stream = open_stream(Path(path).parent / "run", path, plain, packing=False)
    stored = build_dataset(
        path,
        plain,
        settings(),
        vocab_size=plain.vocab_size,
        split="train",
        reads="mixed",
    )
    length = stream.frame.length
    loader = Loader(stored, length=length, packing=False, seed=0, shuffle=False)
    same(rest(stream), list(loader.epoch(ROWS)))


@pytest.mark.parametrize("saved", [0, 1, 4])
def test_a_growing_file_killed_in_between(whole, plain, tmp_path, saved):
    data, expected, _ = whole
    path, cut = tmp_path / "d.jsonl", len(data) * 3 // 5 + 3  # in a line
    path.write_bytes(data[:cut])
    stop = threading.Event()
    first = open_stream(tmp_path / "run", path, plain, halted=stop.is_set)
    threading.Timer(WAIT / 2, stop.set).start()  # the wait is not over yet
    found: list[Any] = []
    place = None
    while (batch := first.batch(len(found))) is not None:
        found.append(batch)
        place = known(first) if len(found) == saved else place
    assert first.end is None and 4 < len(found) < len(expected)
    del first
    with path.open("ab") as file:
        file.write(data[cut:])
    second = open_stream(tmp_path / "run", path, plain, place)
    same(found[:saved] + rest(second, saved), expected)
    assert (tmp_path / "run" / spools.NAME).read_bytes() == data
    same(rest(open_stream(tmp_path / "run", path, plain)), expected)


def test_a_file_that_grows_while_it_is_read(whole, plain, tmp_path):
    data, expected, _ = whole
    path = tmp_path / "d.jsonl"
    path.touch()

    def write_slowly():
        with path.open("ab", buffering=0) as file:
            for start in range(0, len(data), 700):
                file.write(data[start : start + 700])
                time.sleep(WAIT / 10)

    writer = threading.Thread(target=write_slowly)
    writer.start()
    found = rest(open_stream(tmp_path / "run", path, plain))
    writer.join()
    same(found, expected)


def test_a_pipe_killed_in_between(whole, plain, tmp_path):
    data, expected, _ = whole
    pipe, folder = tmp_path / "pipe", tmp_path / "run"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)  # one that never meets a pipe without a reader
    first = open_stream(folder, pipe, plain)
    os.write(writer, data[: len(data) // 2])
    found = [first.batch(step) for step in range(3)]
    place = known(first)
    same(found, expected[:3])
    os.write(writer, data[len(data) // 2 : -5])
    del first  # what it has not read is still in the pipe
    second = open_stream(folder, pipe, plain, place)
    got = [second.batch(3)]
    os.write(writer, data[-5:])
    os.close(writer)
    same(found + got + rest(second, 4), expected)
    assert (folder / spools.NAME).read_bytes() == data
    # It has ended: nobody waits for another writer.
    same(rest(open_stream(folder, pipe, plain)), expected)


def test_standard_input_and_a_stop_while_waiting(whole, plain, tmp_path, monkeypatch):
    _, expected, _ = whole
    source, sink = os.pipe()
    monkeypatch.setattr("ftjax.data.feed.STDIN_HANDLE", source)
    os.write(sink, whole[0][:2000])
    began = time.monotonic()
    stream = open_stream(
        tmp_path / "run",
        "-",
        plain,
        halted=lambda: time.monotonic() - began > 0.3,
    )
    found = rest(stream)
    assert 0 < len(found) < len(expected) and stream.end is None
    same(found, expected[: len(found)])
    os.close(sink)


def test_a_bad_line_stops_after_the_good_batches(whole, plain, tmp_path):
    data, expected, _ = whole
    good_lines = data.splitlines(keepends=True)
    broken = [*good_lines[:40], b"{broken\n", *good_lines[40:]]
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"".join(broken))
    stream = open_stream(tmp_path / "run", path, plain)
    found = rest(stream)
    assert stream.fault is not None and stream.end is None
    assert stream.fault.where == "d.jsonl:41, column 2"
    same(found, expected[: len(found)])
    assert len(found) > 3
    place, count = known(stream), len(found)
    skipping = {"on_bad_row": "skip"}
    again = open_stream(tmp_path / "run", path, plain, place, **skipping)
    same(found + rest(again, count), expected)
    assert again.report.skipped_rows == 1 and "d.jsonl:41" in again.text()
    # Or the line is mended where it stands.
    path.write_bytes(data)
    mended = open_stream(tmp_path / "run", path, plain, place)
    same(found + rest(mended, count), expected)


def test_overlong_rows_follow_the_rule(plain, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines([{"text": "a b"}, {"text": "much " * 99}, {"text": "c d"}]))
    for rule, kept in (("drop", 2), ("truncate", 3)):
        stream = open_stream(tmp_path / rule, path, plain, overlong=rule)
        rest(stream)
        assert (stream.report.read, stream.report.kept) == (3, kept)
    stream = open_stream(tmp_path / "error", path, plain, overlong="error")
    assert rest(stream) == []
    assert stream.fault is not None and stream.fault.where == "d.jsonl:2"


def test_a_line_too_long_is_left_out_and_counted(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(spools, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr("ftjax.data.feed.PIECE", 64)
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines([{"text": "a b"}, {"text": "x" * 900}, {"text": "c d"}]))
    stream = open_stream(tmp_path / "run", path, plain, on_bad_row="skip")
    [batch] = rest(stream)
    assert (stream.report.read, stream.report.kept) == (3, 2)
    assert stream.place.bytes == path.stat().st_size and batch["text"].sum() == 2


def test_what_was_read_must_not_change(whole, plain, tmp_path):
    data, _, _ = whole
    path, folder = tmp_path / "d.jsonl", tmp_path / "run"
    path.write_bytes(data)
    stream = open_stream(folder, path, plain)
    stream.batch(2)
    place = known(stream)
    path.write_bytes(b" " + data)
    error = fault_of(lambda: open_stream(folder, path, plain, place))
    assert "not the one" in error.what and "another byte 0" in error.got
    (folder / spools.NAME).write_bytes(b" " + data)
    error = fault_of(lambda: open_stream(folder, path, plain, place))
    assert "no longer there" in error.what


def test_a_stream_without_a_row_says_so(plain, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n")
    stream = open_stream(tmp_path / "run", path, plain)
    assert stream.batch(0) is None
    assert stream.fault is not None and "nothing is left" in stream.fault.what


def test_sources_that_are_no_stream(plain, tmp_path):
    (tmp_path / "d.txt").write_text("a")
    for name, words in (("d.txt", "another kind"), ("", "no file"), ("x", "No such")):
        error = fault_of(
            lambda name=name: open_stream(tmp_path / "r", tmp_path / name, plain)
        )
        assert words in error.got and "named pipe" in error.expected
