"""Runs that are stopped, killed, or lose their directory, and what is left of them."""

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli import Result, Running, run_cli, start_cli
from tests.faults.commands import PAIRS, contents, options, write_rows

ENDLESS = ("--config.train.steps=1000000", "--config.train.save_every=1000000")
TIMES = ("time", "tokens_per_s")
METRICS = "metrics.jsonl"


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run, without what the clock has to say."""
    rows = [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def trained_steps(workdir: Path) -> list[int]:
    return [row["step"] for row in metrics(workdir) if row["split"] == "train"]


@pytest.fixture(scope="module")
def eval_flags(shelf: Path) -> tuple[str, ...]:
    rows = [{"prompt": p["prompt"] + "!", "completion": "?"} for p in PAIRS[:3]]
    data = write_rows(shelf / "eval.jsonl", rows)
    return (f"--config.data.eval={data}", "--config.train.eval_every=4")


class Kept:
    """A run that is killed again and again, and one that was left alone."""

    def __init__(self, flags: tuple[str, ...], env: dict[str, str], folder: Path):
        self.flags, self.env = flags, env
        self.alone, self.workdir = folder / "alone", folder / "killed"
        self.train(self.alone).ok()

    def train(self, workdir: Path) -> Result:
        return run_cli("train", *self.flags, f"--workdir={workdir}", env=self.env)

    def killed_at(self, moment: str) -> str:
        """What a start said until the kill at this moment."""
        command = ("tests.faults.killed", moment, "train", *self.flags)
        result = run_cli(*command, f"--workdir={self.workdir}", env=self.env)
        assert result.code == -signal.SIGKILL, (moment, result.err)
        return result.out

    def same(self) -> None:
        """Both runs have learned the same to the last bit, and say the same."""
        assert metrics(self.workdir) == metrics(self.alone)
        found, wanted = contents(self.workdir), contents(self.alone)
        for name in ("adapter/adapter_model.safetensors", "config.json"):
            assert found[name] == wanted[name]
        assert not [name for name in found if "/." in name], "a kill has left files"


def test_kill_at_every_stage_of_a_save(
    tiny: Path,
    pairs: Path,
    eval_flags: tuple[str, ...],
    compiled: dict[str, str],
    tmp_path: Path,
) -> None:
    flags = (
        "--config.train.steps=8",
        "--config.train.save_every=2",
        "--config.train.keep_last=1",
        "--config.method.dropout=0.1",
        "--config.optim.lr=0.01",
    )
    kept = Kept(options(tiny, pairs, *eval_flags, *flags), compiled, tmp_path)
    kept.killed_at("seal:1")  # in the first save
    said = kept.killed_at("log:5")  # between two steps: step 3 is logged, not saved
    assert "removed an unfinished save of step 2" in said and "continuing" not in said
    assert trained_steps(kept.workdir) == [1, 2, 3]
    with (kept.workdir / METRICS).open("a") as file:
        file.write('{"step": 4, "spl')  # the line that it was writing
    said = kept.killed_at("name:1")  # step 4 is logged and written, but has no name
    assert "continuing after step 2" in said
    said = kept.killed_at("retire:1")  # step 4 is saved, step 2 not yet deleted
    assert "removed an unfinished save of step 4" in said
    assert "continuing after step 2" in said
    said = kept.killed_at("remove:1")  # step 2 is half deleted
    assert "continuing after step 4" in said
    said = kept.killed_at("report:1")  # step 8 is saved
    assert "continuing after step 6" in said
    assert "done already: step 8" in kept.train(kept.workdir).ok().out
    kept.same()


@pytest.mark.long
def test_kill_at_random_moments(
    tiny: Path,
    pairs: Path,
    eval_flags: tuple[str, ...],
    compiled: dict[str, str],
    tmp_path: Path,
) -> None:
    flags = (
        "--config.train.steps=2000",
        "--config.train.save_every=7",
        "--config.train.eval_every=50",
        "--config.train.keep_last=2",
    )
    kept = Kept(options(tiny, pairs, *eval_flags, *flags), compiled, tmp_path)
    chance, log, kills = random.Random(0), tmp_path / "log", 0
    command = ("train", *kept.flags, f"--workdir={kept.workdir}")
    while kills < 100:
        with start_cli(*command, log=log, env=kept.env) as run:
            if kills:
                run.wait_for_line(log, "continuing after step")
            else:
                run.wait_for_line(kept.workdir / METRICS, '"step": 20,')
            time.sleep(chance.uniform(0, 1.5))
            done = run.process.poll() is not None
            result = run.stop(signal.SIGKILL)
        if done:
            result.ok()
            break
        kills += 1
    assert kills >= 10
    kept.train(kept.workdir).ok()
    kept.same()


def endless(tiny: Path, pairs: Path, env: dict[str, str], workdir: Path) -> Running:
    flags = options(tiny, pairs, *ENDLESS, f"--workdir={workdir}")
    return start_cli("train", *flags, log=workdir.with_suffix(".log"), env=env)


def wait_for_step(run: Running, workdir: Path, step: int) -> None:
    run.wait_for_line(workdir / METRICS, f'"step": {step}, "split": "train"')


def saved_step(result: Result, workdir: Path) -> int:
    """The step that a stopped run says it has saved; it is the last one it took."""
    assert result.code == 75, result.err
    last = trained_steps(workdir)[-1]
    assert f"stopped: saved step {last} of 1000000" in result.out
    assert "the same command continues" in result.out
    assert (workdir / "checkpoints" / str(last)).is_dir()
    return last


def test_a_signal_saves_and_the_same_command_continues(
    tiny: Path, pairs: Path, compiled: dict[str, str], tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    with endless(tiny, pairs, compiled, workdir) as run:
        wait_for_step(run, workdir, 5)
        first = saved_step(run.stop(signal.SIGTERM), workdir)
    with endless(tiny, pairs, compiled, workdir) as run:
        wait_for_step(run, workdir, first + 5)
        result = run.stop(signal.SIGINT)
    assert f"continuing after step {first}" in result.out
    second = saved_step(result, workdir)
    assert trained_steps(workdir) == list(range(1, second + 1))
    last = f"--config.train.steps={second + 3}"
    flags = options(tiny, pairs, *ENDLESS, last, f"--workdir={workdir}")
    result = run_cli("train", *flags, env=compiled).ok()
    assert f"changed since the run began: train.steps: 1000000 -> {second + 3}" in (
        result.out
    )
    assert f"continuing after step {second}" in result.out
    assert trained_steps(workdir) == list(range(1, second + 4))


def test_a_second_interrupt_stops_at_once(
    tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    # Without compiled programs: it is still compiling when the signals come.
    with endless(tiny, pairs, {}, workdir) as run:
        run.wait_for_line(run.log, "trained on")
        run.process.send_signal(signal.SIGINT)
        run.wait_for_line(run.log, "press Ctrl-C again")
        result = run.stop(signal.SIGINT)
    # Inside an exec() of source text, as dataclasses do it, Python marks the interrupt
    # and ends `python -m` by the signal itself: to a shell both are 130.
    assert result.code in (130, -signal.SIGINT) and "interrupted" in result.out
    assert "Traceback" not in result.out
    assert not (workdir / "checkpoints").exists()


@pytest.mark.parametrize("kind", ["file", "below a file", "unwritable"])
def test_a_directory_that_cannot_be_used(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("mine")
    workdir = {
        "file": file,
        "below a file": file / "run",
        "unwritable": Path("/sys/kernel/ftjax-run"),  # closed to root as well
    }[kind]
    if kind == "unwritable" and not workdir.parent.is_dir():
        pytest.skip("there is no /sys on this system")
    # The model is not there either, but nobody has looked yet.
    flags = options("/nowhere", "/nowhere", f"--workdir={workdir}")
    run_cli("train", *flags).refused(
        "the run directory cannot be used", str(workdir), "--workdir"
    )
    assert file.read_text() == "mine"


def test_a_directory_that_is_deleted_while_the_run_goes_on(
    tiny: Path, pairs: Path, compiled: dict[str, str], tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    flags = options(
        tiny,
        pairs,
        "--config.train.steps=1000000",
        "--config.train.save_every=20",
        f"--workdir={workdir}",
    )
    log = tmp_path / "log"
    with start_cli("train", *flags, log=log, env=compiled) as run:
        wait_for_step(run, workdir, 5)
        shutil.rmtree(workdir, ignore_errors=True)
        result = run.wait()
    result.refused("the run directory can no longer be written to", str(workdir))
