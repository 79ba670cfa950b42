"""Tables, progress and outputs that go away."""

import io
import os
import subprocess
import sys

import pytest

from ftjax.console import Progress, count, duration, printable, say, table
from tests.conftest import ROOT


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_table_aligns_numbers_right_and_text_left() -> None:
    rows = [("q_proj", 4096, "1.56%"), ("embedding", 12, None)]
    assert table(rows, ("target", "count", "share")) == (
        "target     count  share\n"
        "---------  -----  -----\n"
        "q_proj     4,096  1.56%\n"
        "embedding     12"
    )


def test_table_counts_columns_as_a_terminal_does() -> None:
    lines = table([("日本", "x"), ("e\u0301", "y")]).split("\n")
    assert lines == ["日本  x", "e\u0301     y"]


def test_table_wraps_at_spaces_and_keeps_line_breaks() -> None:
    text = table([("one two three", "a\nb"), ("abcdefghij", "c")], wrap=7)
    assert text == "one two  a\nthree    b\n\nabcdefg  c\nhij"


def test_table_of_nothing() -> None:
    assert table([]) == ""
    assert table([], ("a", "b")) == "a  b\n-  -"


def test_control_characters_cannot_reach_the_terminal() -> None:
    assert printable("a\x1b[31mb\r\u202ec\td\n") == "a\\x1b[31mb\\r\\u202ec\td\n"
    assert printable("\ud800") == "\\ud800"
    assert "\x1b" not in table([("\x1b[2J", 1)])


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (7, "7"),
        (12.34, "12.3"),
        (999, "999"),
        (1000, "1.00k"),
        (12_345, "12.3k"),
        (999_949, "1.00M"),
        (6_738_415_616, "6.74B"),
    ],
)
def test_count(n: float, text: str) -> None:
    assert count(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.8s"),
        (9.97, "10s"),
        (59.7, "1m 00s"),
        (185, "3m 05s"),
        (7800, "2h 10m"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_progress_prints_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with Progress(100, stream=out) as progress:
        progress.update(5, {"loss": 2.5, "margin": 0.25}, tokens_per_s=1234.0, eta_s=61)
        progress.note("saved step 5")
        progress.update(100)
    assert out.getvalue() == (
        "step   5/100  loss 2.5000  1.23k tokens/s  1m 01s left  margin 0.25\n"
        "saved step 5\n"
        "step 100/100\n"
    )


def test_progress_redraws_one_line_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    out = Terminal()
    progress = Progress(4, stream=out)
    progress.update(2, {"loss": 1.0})
    progress.note("eval loss 0.9")
    progress.update(4, {"loss": 0.5}, tokens_per_s=10.0, eta_s=0.0)
    progress.close()
    text = out.getvalue()
    assert text.count("\n") == 2 and text.endswith("\n")
    assert " 50% |████████████            | 2/4" in text
    assert "100%" in text and "eval loss 0.9\n" in text
    assert all(len(part) < 60 for line in text.split("\n") for part in line.split("\r"))


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    Progress(2, stream=out).update(1)
    assert out.getvalue() == "step 1/2\n"


def test_a_reader_that_goes_away_ends_nothing() -> None:
    script = (
        "import sys\nfrom ftjax.console import Progress, say\n"
        "progress = Progress(50000)\n"
        "for step in range(50000): progress.update(step, {'loss': 1.0})\n"
        "say('more'); print('more'); print('done', file=sys.stderr)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    assert process.stdout.readline().startswith("step     0/50000")
    process.stdout.close()
    assert process.stderr.read() == "done\n"
    assert process.wait(60) == 0
    process.stderr.close()


def test_closed_and_narrow_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    say("nowhere")
    assert sys.stdout.name == os.devnull
    sys.stdout.close()
    buffer = io.BytesIO()
    narrow = io.TextIOWrapper(buffer, encoding="ascii")
    say("naïve", stream=narrow)
    assert buffer.getvalue() == b"na?ve\n"
