"""What the tests of checkpoints share."""

from pathlib import Path

import pytest

from tests.checkpoints.states import Run
from tests.checkpoints.stored import write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint, in a folder whose name has a space and an accent."""
    folder = tmp_path / "a módel"
    write_checkpoint(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "checkpoints")
