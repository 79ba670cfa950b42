"""Runs a command that kills itself, as kill -9 would, at a chosen moment.

    python -m tests.faults.killed MOMENT:COUNT ENTRY --flag=value ...

ENTRY is the real command (`train`, `export`); the process dies when MOMENT, one of
`MOMENTS`, comes for the COUNTth time.
"""

import importlib
import os
import runpy
import signal
import sys
from typing import Any

MOMENTS = {
    # A step's row is written, the next step is being computed.
    "log": ("ftjax.metrics", "MetricLog.write"),
    # A save has begun, its folder is empty.
    "arrays": ("ftjax.checkpoints.state", "write_arrays"),
    # The arrays of a save are on disk, its manifest is not.
    "seal": ("ftjax.checkpoints.state", "seal"),
    # A save is whole, but has no name.
    "name": ("ftjax.checkpoints.state", "Checkpoints._publish"),
    # A save is done; the older one has not been retired.
    "retire": ("ftjax.checkpoints.state", "Checkpoints._retire"),
    # An older save has lost its name and is about to be deleted.
    "remove": ("ftjax.checkpoints.state", "Checkpoints._remove"),
    # The run is over, its report is not written.
    "report": ("ftjax.report", "write_report"),
    # The files of an export are written, its folder has no name.
    "export": ("ftjax.checkpoints.folder", "refuse_existing"),
}


def kill_at(moment: str, count: int) -> None:
    """Puts the kill in front of the function that stands for the moment."""
    module_name, path = MOMENTS[moment]
    owner: Any = importlib.import_module(module_name)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls = 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, patched)


if __name__ == "__main__":
    moment, _, count = sys.argv[1].partition(":")
    entry = f"ftjax.{sys.argv[2]}"
    kill_at(moment, int(count))
    sys.argv = [entry, *sys.argv[3:]]
    runpy.run_module(entry, run_name="__main__", alter_sys=True)
