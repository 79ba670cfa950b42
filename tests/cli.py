"""Runs ftjax's commands as a user does: in a process of their own.

A test of one bad input is a few lines:

    result = run_cli("train", f"--config.data.train={path}", f"--workdir={tmp_path}")
    result.refused("bad.jsonl:2", "not JSON")
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, both streams, and its last line as JSON."""

    code: int
    out: str
    err: str
    json: dict[str, Any] | None
    seconds: float

    def ok(self) -> "Result":
        """Asserts exit code 0, showing the end of both streams otherwise."""
        assert self.code == 0, self._shown()
        return self

    def refused(self, *parts: str, code: int = 2) -> "Result":
        """Asserts a refusal: this exit code, one screen, each of `parts` in it."""
        assert self.code == code, self._shown()
        start = self.err.find("error: ")
        assert start >= 0, self._shown()
        screen = self.err[start:]
        assert "Traceback" not in self.err + self.out, self._shown()
        assert screen.count("\n") <= 24, f"more than one screen:\n{screen}"
        for part in parts:
            assert part in screen, f"{part!r} is not in the message:\n{screen}"
        return self

    def _shown(self) -> str:
        return (
            f"exit code {self.code} after {self.seconds:.1f} s\n"
            f"--- stdout ---\n{self.out[-2000:]}\n--- stderr ---\n{self.err[-4000:]}"
        )


def run_cli(
    entry: str,
    *args: str | os.PathLike[str],
    env: dict[str, str] | None = None,
    timeout: float = 120,
    devices: int = 1,
    stdin: str | None = None,
    cwd: Path = ROOT,
) -> Result:
    """Runs `python -m ftjax.<entry> args...` to its end.

    Args:
      entry: a name under `ftjax.`, or a dotted module name such as
        `benchmarks.train_step`.
      env: variables added to the environment.
      timeout: seconds; a command that takes longer is killed and fails the test.
      devices: how many CPU devices the command sees.
      stdin: what it reads; nothing by default.
      cwd: the folder it runs in, the checkout by default.
    """
    start = time.monotonic()
    done = subprocess.run(
        _command(entry, args),
        env=_environment(env, devices, share_cache=True),
        cwd=cwd,
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    seconds = time.monotonic() - start
    return Result(
        done.returncode, done.stdout, done.stderr, _last(done.stdout), seconds
    )


class Running:
    """A command that has been started, to be waited for, signalled or killed."""

    def __init__(self, process: subprocess.Popen[str], log: Path):
        self.process, self.log, self._start = process, log, time.monotonic()

    def wait_for(self, path: Path, timeout: float = 120) -> None:
        """Waits until `path` exists; fails if the command ends before that."""
        deadline = time.monotonic() + timeout
        while not path.exists():
            assert self.process.poll() is None, f"it ended early:\n{self.text()}"
            assert time.monotonic() < deadline, f"no {path}:\n{self.text()}"
            time.sleep(0.02)

    def wait_for_line(self, path: Path, text: str, timeout: float = 120) -> None:
        """Waits until the file `path` holds `text`."""
        deadline = time.monotonic() + timeout
        while not (path.exists() and text in path.read_text()):
            assert self.process.poll() is None, f"it ended early:\n{self.text()}"
            assert time.monotonic() < deadline, f"no {text!r}:\n{self.text()}"
            time.sleep(0.02)

    def stop(
        self, sign: signal.Signals = signal.SIGTERM, timeout: float = 60
    ) -> Result:
        """Sends a signal and waits for the end; `SIGKILL` is kill -9."""
        self.process.send_signal(sign)
        return self.wait(timeout)

    def wait(self, timeout: float = 120) -> Result:
        """Waits for the end; both streams are in `out`."""
        code = self.process.wait(timeout)
        out = self.text()
        return Result(code, out, out, _last(out), time.monotonic() - self._start)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def start_cli(
    entry: str,
    *args: str | os.PathLike[str],
    log: Path,
    env: dict[str, str] | None = None,
    devices: int = 1,
) -> Running:
    """Starts a command that the test will interrupt; use it in a `with`.

    It does not write to the shared compilation cache: JAX writes an entry in place, so
    that a process killed at the wrong moment would leave a torn one for all later runs.
    """
    with log.open("w") as stream:
        process = subprocess.Popen(
            _command(entry, args),
            env=_environment(env, devices, share_cache=False),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return Running(process, log)


def _command(entry: str, args: tuple[str | os.PathLike[str], ...]) -> list[str]:
    module = entry if "." in entry else f"ftjax.{entry}"
    return [sys.executable, "-m", module, *(os.fspath(arg) for arg in args)]


def _environment(
    extra: dict[str, str] | None, devices: int, *, share_cache: bool
) -> dict[str, str]:
    env = dict(os.environ, PYTHONPATH=str(ROOT), JAX_NUM_CPU_DEVICES=str(devices))
    if not share_cache:
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
    return env | (extra or {})


def _last(out: str) -> dict[str, Any] | None:
    lines = out.strip().splitlines()
    try:
        value = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
