"""What the fault tests share: a checkpoint, rows, and one small run."""

import os
from pathlib import Path

import pytest

from tests.faults.commands import PAIRS, finished_run, write_rows
from tests.tiny import make_tiny_checkpoint


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def tiny(shelf: Path) -> Path:
    """A tiny checkpoint that tests only read."""
    return make_tiny_checkpoint(shelf / "tiny")


@pytest.fixture(scope="session")
def pairs(shelf: Path) -> Path:
    """A small file of prompts and completions."""
    return write_rows(shelf / "pairs.jsonl", PAIRS)


@pytest.fixture(scope="session")
def finished(shelf: Path, tiny: Path, pairs: Path) -> Path:
    """The directory of a LoRA run that has ended; tests only read it."""
    return finished_run(tiny, pairs, shelf / "finished")


@pytest.fixture(scope="session")
def compiled(shelf: Path) -> dict[str, str]:
    """An environment with a compilation cache that killed processes may spoil."""
    return {
        "JAX_COMPILATION_CACHE_DIR": os.fspath(shelf / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
