"""A row's process, from the parent's side: start, take a turn, close."""

import contextlib
import dataclasses
import json
import os
import selectors
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Any

from benchmarks.turns import Request

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 900.0  # seconds for one answer


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Row:
    """One implementation at one task.

    Attributes:
      turns: what each step told: seconds, cpu_seconds, value, peak_mb, baseline_mb.
      fault: why there is nothing (more) to measure; empty while all is well.
      versions: of the libraries that it uses.
    """

    def __init__(self, name: str, module: str, python: str, request: Request):
        self.name, self.module, self.python = name, module, python
        self.request = request
        self.turns: list[dict[str, Any]] = []
        self.versions: dict[str, str] = {}
        self.fault = ""
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None

    def start(self) -> None:
        """Imports and builds the model; returns when it waits for its first turn."""
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        request = json.dumps(dataclasses.asdict(self.request))
        try:
            self._process = subprocess.Popen(
                [self.python, "-m", self.module, request],
                cwd=ROOT,
                env=_environment(self.request.threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        except OSError as error:
            self.fault = f"cannot run {self.python}: {error.strerror}"
            return
        self.versions = self._answer().get("ready", {})

    def turn(self) -> None:
        """Runs one step; does nothing after a fault."""
        if self.fault:
            return
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.fault = self._death()
            return
        answer = self._answer()
        if not self.fault:
            self.turns.append(answer)

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            if not ready.select(PATIENCE):
                self.fault = f"no answer in {PATIENCE:.0f} s"
                self._process.kill()
                return {}
        line = self._process.stdout.readline()
        if not line:
            self.fault = self._death()
            return {}
        answer: dict[str, Any] = json.loads(line)
        self.fault = answer.get("error", "")
        return answer

    def _death(self) -> str:
        assert self._process is not None and self._log is not None
        code = self._process.wait()
        if code == -9:
            return "killed: it did not fit in memory"
        self._log.seek(0)
        said = [line.strip() for line in self._log if line.strip()]
        return f"ended with code {code}: {said[-1] if said else 'no message'}"

    def close(self) -> None:
        """Ends the process: with its input, or else by force."""
        if self._process is not None:
            if self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None


def _environment(threads: int) -> dict[str, str]:
    """This one's, without what would spare a row its compilation or its cores.

    OpenMP's idle threads must sleep: they would burn the cores of whoever's turn it is.
    """
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env |= {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return env
