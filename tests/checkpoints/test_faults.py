"""What survives kill -9 at any moment, and a disk that is full."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.checkpoints.state import Checkpoints
from ftjax.errors import EXIT_RESOURCES, UserError
from tests.checkpoints.saver import like, state_at
from tests.conftest import ROOT

# Of several writes that fail at once, Orbax waits for the first; tensorstore's thread
# may then report another to an event loop that is closed. What is raised is looked at.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:pytest.PytestUnraisableExceptionWarning"
)

TINY, LARGE = 100, 3_000_000  # floats in each of four arrays: 2 KB, 48 MB


def kill_while_saving(folder: Path, floats: int, delay: float) -> list[int]:
    """Starts the saver, kills it `delay` seconds after it is ready; what it saved."""
    command = [sys.executable, "-m", "tests.checkpoints.saver", folder, floats]
    with subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready"):
                break
        time.sleep(delay)
        process.kill()
        saved = [line for line in process.stdout if line.startswith("saved")]
    assert process.returncode == -signal.SIGKILL
    # The kill may have cut the last line short.
    return [int(line.split()[1]) for line in saved if line.endswith("\n")]


def assert_whole(folder: Path, floats: int, at_least: int) -> int:
    """Every listed step restores to what was saved; returns the newest."""
    said: list[str] = []
    checkpoints = Checkpoints(folder, report=said.append)
    newest = checkpoints.latest() or 0
    assert newest >= at_least, "a save that had returned is lost"
    for step in checkpoints.steps():
        restored = checkpoints.restore(step, like(floats))
        for name, array in state_at(step, floats).items():
            assert np.array_equal(restored[name], array), (step, name)
        assert checkpoints.meta(step)["step"] == step
    assert said == [], "nothing listed is damaged"
    return newest


def kill_many(folder: Path, floats: int, times: int, longest: float) -> None:
    delays, newest = random.Random(floats), 0
    for _ in range(times):
        saved = kill_while_saving(folder, floats, delays.uniform(0, longest))
        newest = assert_whole(folder, floats, max([newest, *saved]))
    assert newest > 0
    names = {path.name for path in folder.iterdir()}
    assert not {n for n in names if ".damaged" in n}


def test_kill_while_saving_tiny_states(tmp_path: Path) -> None:
    kill_many(tmp_path / "c", TINY, times=6, longest=0.6)


def test_kill_while_saving_large_states(tmp_path: Path) -> None:
    kill_many(tmp_path / "c", LARGE, times=4, longest=1.5)


@pytest.mark.long
def test_a_hundred_kills(tmp_path: Path) -> None:
    kill_many(tmp_path / "tiny", TINY, times=60, longest=0.6)
    kill_many(tmp_path / "large", LARGE, times=40, longest=1.5)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "ftjax-test", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("may not mount a tmpfs here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def megabytes(count: float, step: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    return {"w": jnp.asarray(rng.random(int(count * 250_000), "f4"))}


def test_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(small_disk / "c", keep_last=3)
    checkpoints.save(1, megabytes(1), {})
    with pytest.raises(UserError, match="disk space") as caught:
        checkpoints.save(2, megabytes(5), {})
    assert caught.value.code == EXIT_RESOURCES
    # And where the estimate sees it too late.
    monkeypatch.setattr("ftjax.checkpoints.state.require_space", lambda *_: None)
    for _ in range(2):
        with pytest.raises(UserError, match="disk is full") as caught:
            checkpoints.save(2, megabytes(5), {})
        assert caught.value.code == EXIT_RESOURCES
        assert [path.name for path in checkpoints.dir.iterdir()] == ["1"]
    assert checkpoints.latest() == 1
    checkpoints.save(3, megabytes(1.5, 3), {})
    assert checkpoints.latest() == 3
    restored = checkpoints.restore(1, megabytes(1))
    assert np.array_equal(restored["w"], megabytes(1)["w"])


def test_file_size_limit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, megabytes(0.1), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(UserError) as caught:
            checkpoints.save(2, megabytes(4), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == EXIT_RESOURCES
    assert os.listdir(checkpoints.dir) == ["1"]
    assert checkpoints.latest() == 1
