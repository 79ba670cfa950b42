"""What the process of a row does, in any implementation: one step at a time, when told.

Only the standard library, since peers run in interpreters that have nothing of ours.
The parent writes a line for each step that it wants and reads a line of JSON for each,
so it can let several implementations take turns, step by step, on a machine whose speed
changes from minute to minute.
"""

import json
import os
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Step = Callable[[int], Any]  # step(i): runs synchronized; its loss, or its tokens


@dataclass(frozen=True)
class Request:
    """One row: what to run. `checkpoint` is a Hugging Face folder."""

    task: str  # 'full', 'lora', 'qlora', these after 'dpo ', or 'generate'
    checkpoint: str
    vocab_size: int
    rows: int
    length: int
    new_tokens: int  # 'generate' only: `length` is then the prompts'
    learning_rate: float
    rank: int
    alpha: float
    threads: int

    def tokens(self, index: int) -> list[list[int]]:
        """The token ids of step `index`: the same for every implementation.

        0 and 1 are left out: padding and end of text, for those who must have them.
        """
        draw = random.Random(f"tokens {index}")
        return [
            [draw.randrange(2, self.vocab_size) for _ in range(self.length)]
            for _ in range(self.rows)
        ]


def serve(build: Callable[[Request], tuple[Step, dict[str, str]]]) -> None:
    """Builds the row's step, then runs it once for every line on stdin.

    Args:
      build: imports what is heavy, and calls `note_baseline` when that is done; returns
        the step, and the versions of the libraries.
    """
    # Libraries print to stdout: keep it for the answers alone.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        request = Request(**json.loads(sys.argv[1]))
        step, versions = build(request)
        print(json.dumps({"ready": versions}), file=answers)
        for index, _ in enumerate(sys.stdin):
            print(json.dumps(_timed(step, index)), file=answers)
    except ImportError as error:
        print(json.dumps({"error": f"not installed: {error}"}), file=answers)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        text = f"{type(error).__name__}: {lines[0]}"
        print(json.dumps({"error": text}), file=answers)


def _timed(step: Step, index: int) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), _cpu_seconds()
    value = step(index)
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": _cpu_seconds() - cpu,
        "value": value,
        "baseline_mb": _baseline_mb,
        "peak_mb": memory_mb("VmHWM"),
    }


_baseline_mb = 0.0


def note_baseline() -> None:
    """Notes the memory after the imports and before the first weight."""
    global _baseline_mb
    _baseline_mb = memory_mb("VmRSS")


def memory_mb(field: str) -> float:
    """A line of /proc/self/status in MB (10^6 bytes): VmHWM (the most ever), VmRSS.

    Not `ru_maxrss` where there is /proc: a child inherits that from its parent.
    """
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
