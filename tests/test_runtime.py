"""The process starts over once, with the same program and arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftjax import runtime

PROGRAM = """
import json, os, sys
from ftjax import runtime
print("start", flush=True)
runtime.prepare()
print(json.dumps([os.environ.get("GLIBC_TUNABLES"), sys.argv[1:]]))
"""


def start(*args: str, stdin: str | None = None, **env: str) -> list[str]:
    kept = {k: v for k, v in os.environ.items() if k != runtime.TUNABLES}
    done = subprocess.run(
        [sys.executable, *args],
        input=stdin,
        env=kept | env,
        cwd=Path(runtime.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.splitlines()


def test_it_starts_over_once_where_that_helps() -> None:
    lines = start("-c", PROGRAM, "--a=b c", "d")
    tunables, args = json.loads(lines[-1])
    assert args == ["--a=b c", "d"]
    if tunables is None:
        assert lines[:-1] == ["start"]
        pytest.skip("huge pages need not, or cannot, be asked for here")
    assert tunables == runtime.HUGE_PAGES and lines[:-1] == ["start", "start"]


def test_what_the_user_has_set_stays() -> None:
    lines = start("-c", PROGRAM, GLIBC_TUNABLES="")
    assert lines[0] == "start" and json.loads(lines[1]) == ["", []]


def test_a_program_from_stdin_is_not_read_twice() -> None:
    lines = start("-", stdin=PROGRAM)
    assert lines[0] == "start" and json.loads(lines[1]) == [None, []]


def test_memory_can_be_given_back() -> None:
    runtime.release_memory()
