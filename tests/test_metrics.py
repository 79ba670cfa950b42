"""The metrics of a run survive kills, resumes and broken writers."""

import json
import math
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.errors import UserError
from ftjax.metrics import MetricLog, cut_rows, read_rows


def write_steps(workdir: Path, steps: range, resume_step: int | None) -> None:
    with MetricLog(workdir, resume_step=resume_step) as log:
        for step in steps:
            log.write(step, "train", loss=1.0 / step)
            log.write_sample(step, "p", f"text {step}")


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8), None)
    write_steps(tmp_path, range(5, 10), 4)
    for name in ("metrics.jsonl", "samples.jsonl"):
        steps = [row["step"] for row in read_rows(tmp_path / name)]
        assert steps == list(range(1, 10))


def test_a_run_that_starts_over_leaves_no_old_rows(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4), None)
    write_steps(tmp_path, range(1, 3), None)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_torn_line_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(tmp_path, range(1, 4), None)
    whole = path.read_bytes()
    # Torn inside a character, and a last line whole but for its end.
    for torn in (b'{"step": 4, "split": "tr\xc3', b'{"step": 4, "split": "train"}'):
        path.write_bytes(whole + torn)
        assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
        write_steps(tmp_path, range(4, 5), 3)
        assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ['{"a": 1}', '{"step": "x"}', "[1]", "3", "null"])
def test_a_line_of_somebody_else_is_dropped_too(tmp_path: Path, line: str) -> None:
    write_steps(tmp_path, range(1, 4), None)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    write_steps(tmp_path, range(4, 5), 3)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [
        1,
        2,
        3,
        4,
    ]


def test_a_cut_of_nothing_leaves_the_file_alone(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4), None)
    path = tmp_path / "metrics.jsonl"
    before = path.stat()
    assert cut_rows(path, 3) == 0
    assert path.stat().st_ino == before.st_ino
    assert cut_rows(path, 1) == 2
    assert not list(tmp_path.glob("*.partial"))
    assert cut_rows(tmp_path / "absent.jsonl", 1) == 0


def test_each_row_is_on_disk_at_once_and_is_strict_json(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, resume_step=None)
    log.write(1, "train", loss=float("nan"), lr=np.float32(0.5), tokens=np.int64(7))
    log.write(2, "eval", loss=jnp.float32(jnp.inf), perplexity=-math.inf)
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    raw = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert raw[0] == {
        "step": 1,
        "split": "train",
        "loss": "NaN",
        "lr": 0.5,
        "tokens": 7,
    }
    first, second = read_rows(tmp_path / "metrics.jsonl")
    assert math.isnan(first["loss"]) and isinstance(first["tokens"], int)
    assert second["loss"] == math.inf and second["perplexity"] == -math.inf
    log.close()
    log.close()


def test_text_that_spells_a_number_stays_text(tmp_path: Path) -> None:
    with MetricLog(tmp_path, resume_step=None) as log:
        log.write_sample(0, "NaN", "Infinity\nü", "r")
    (row,) = read_rows(tmp_path / "samples.jsonl")
    assert row == {"step": 0, "prompt": "NaN", "text": "Infinity\nü", "reference": "r"}


def test_tensorboard_is_written_beside(tmp_path: Path) -> None:
    with MetricLog(tmp_path, resume_step=None, tensorboard=True) as log:
        log.write(1, "train", loss=2.0)
        log.write_sample(1, "p", "t")
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_a_writer_that_fails_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tensorboardX

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full\nat length")

    monkeypatch.setattr(tensorboardX.SummaryWriter, "add_scalar", fail)
    with MetricLog(tmp_path, resume_step=None, tensorboard=True) as log:
        for step in range(3):
            log.write(step, "train", loss=1.0)
    err = capsys.readouterr().err
    assert err.count("warning:") == 1 and "TensorBoard" in err and "disk full" in err
    assert "at length" not in err
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3


def test_wandb_that_is_not_installed_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="not installed") as caught:
        MetricLog(tmp_path, resume_step=None, wandb=True)
    assert "pip install wandb" in caught.value.screen()


def test_wandb_keeps_its_run_over_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, object]] = []
    logged: list[tuple[int, dict[str, object]]] = []

    class Run:
        def log(self, values: dict[str, object], step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append((-1, {}))

    def init(**kwargs: object) -> Run:
        started.append(kwargs)
        return Run()

    fake = types.SimpleNamespace(init=init)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = {"log": {"wandb_project": "p"}}
    for resume in (None, 1):
        with MetricLog(tmp_path, resume_step=resume, wandb=True, config=config) as log:
            log.write(2, "train", loss=1.0)
    assert started[0]["id"] == started[1]["id"] and started[0]["project"] == "p"
    assert logged[:2] == [(2, {"train/loss": 1.0}), (-1, {})]


def test_a_wandb_that_cannot_start_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("no such host")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with MetricLog(tmp_path, resume_step=None, wandb=True) as log:
        log.write(1, "train", loss=1.0)
    assert "no such host" in capsys.readouterr().err
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1
