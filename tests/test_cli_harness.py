"""The harness that runs commands, tried on commands of Python's own."""

import signal
from pathlib import Path

import pytest

from tests.cli import run_cli, start_cli


def test_the_last_line_is_read_as_json() -> None:
    result = run_cli("json.tool", "--compact", stdin='{"a": [1, 2]}').ok()
    assert result.json == {"a": [1, 2]} and result.err == ""
    assert run_cli("json.tool", stdin="[1]").ok().json is None


def test_a_failure_shows_both_streams() -> None:
    result = run_cli("json.tool", stdin="{")
    assert result.code == 1
    with pytest.raises(AssertionError, match="Expecting property name"):
        result.ok()
    with pytest.raises(AssertionError, match="exit code 1"):
        result.refused("property name")


def test_a_command_can_be_interrupted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    folder = ("--bind", "localhost", "--directory", tmp_path, "0")
    with start_cli(
        "http.server", *folder, log=log, env={"PYTHONUNBUFFERED": "1"}
    ) as run:
        run.wait_for_line(log, "Serving")
        result = run.stop(signal.SIGKILL)
    assert result.code == -signal.SIGKILL and "Serving" in result.out
