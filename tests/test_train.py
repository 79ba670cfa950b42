"""The whole run through the real command: what it leaves, resume, packing, devices."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftjax.checkpoints.state import Checkpoints
from ftjax.metrics import METRICS, read_rows
from tests.cli import Result, run_cli

TIMES = ("time", "tokens_per_s")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    text = "a quick brown fox jumps over the lazy dog and then it sleeps"
    words = text.split()
    lines = [
        {
            "prompt": f"Say {i}: " + " ".join(words[: 1 + i % 5]),
            "completion": " " + " ".join(words[i % 7 : 2 + i % 7 + i % 6]),
        }
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def train(model: Path, rows: Path, workdir: Path, *extra: str, **kwargs: Any) -> Result:
    method = kwargs.pop("method", "lora")
    return run_cli(
        "train",
        f"--config=configs/sft.py:model={model},method={method}",
        f"--config.data.train={rows}",
        f"--config.data.eval={rows}",
        "--config.data.max_length=64",
        "--config.data.eval_rows=12",
        "--config.optim.lr=1e-2",
        "--config.optim.warmup=0",
        "--config.train.steps=6",
        "--config.train.batch_size=4",
        "--config.train.eval_every=3",
        "--config.train.save_every=2",
        "--config.train.sample_rows=1",
        "--config.train.sample_tokens=4",
        "--config.log.tensorboard=False",
        f"--workdir={workdir}",
        "--json",
        *extra,
        timeout=300,
        **kwargs,
    )


def history(workdir: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock says."""
    rows = read_rows(workdir / METRICS)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def whole(
    tiny_llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result]:
    """An uninterrupted LoRA run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, train(tiny_llama, rows, workdir).ok()


def test_a_run_learns_and_leaves_what_it_says(whole: tuple[Path, Result]) -> None:
    workdir, result = whole
    assert result.json is not None
    assert result.json["eval"]["loss"] < result.json["eval_before"]["loss"] - 0.1
    assert result.json["steps"] == 6 and result.json["tokens"] > 0
    for name in ("metrics.jsonl", "loss.png", "report.html", "config.json"):
        assert (workdir / name).stat().st_size > 100
    assert (workdir / "adapter" / "adapter_model.safetensors").is_file()
    steps = [row["step"] for row in history(workdir) if row["split"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    evals = [row["step"] for row in history(workdir) if row["split"] == "eval"]
    assert evals == [0, 3, 6]
    saved = Checkpoints(workdir / "checkpoints")
    assert saved.latest() == 6
    meta = saved.meta(6)
    assert meta["method"]["rank"] == 16 and meta["base_hash"] and meta["data"]
    assert meta["chat"] is False


def test_the_table_says_what_each_target_adds(whole: tuple[Path, Result]) -> None:
    # With --json, what is for people goes to stderr.
    assert "q_proj" in whole[1].err and "%" in whole[1].err


def test_the_same_command_again_has_nothing_to_do(
    whole: tuple[Path, Result], tiny_llama: Path, rows: Path
) -> None:
    workdir, first = whole
    before = history(workdir)
    again = train(tiny_llama, rows, workdir).ok()
    assert history(workdir) == before
    assert again.json is not None and first.json is not None
    assert again.json["eval"] == first.json["eval"]


@pytest.mark.parametrize("method", ["lora", "qlora", "bottleneck"])
def test_a_longer_run_continues_to_the_same_arrays(
    method: str, tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    """Six steps at once, and three and three: equal to the last bit."""
    fixed = ("--config.optim.schedule=constant", "--config.train.accumulate=2")
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    train(tiny_llama, rows, straight, *fixed, method=method).ok()
    train(tiny_llama, rows, parts, *fixed, "--config.train.steps=3", method=method).ok()
    train(tiny_llama, rows, parts, *fixed, method=method).ok()
    assert history(parts) == history(straight)
    if method != "bottleneck":
        names = "adapter/adapter_model.safetensors"
        assert (parts / names).read_bytes() == (straight / names).read_bytes()


def test_a_quantized_run_is_used_like_any_other(
    tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    """Evaluated, merged and asked; in two micro-batches, packed or not."""
    run, cut = tmp_path / "run", tmp_path / "cut"
    train(tiny_llama, rows, run, "--config.data.eval_rows=0", method="qlora").ok()
    train(
        tiny_llama,
        rows,
        cut,
        "--config.train.accumulate=2",
        "--config.train.steps=2",
        method="qlora",
    ).ok()
    losses = [
        [row["loss"] for row in history(at) if row["split"] == "train"][:2]
        for at in (run, cut)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    merged = tmp_path / "merged"
    wide = ("--to=merged", "--dtype=float32", f"--out={merged}")
    run_cli("export", f"--workdir={run}", *wide).ok()
    found = []
    for source in (f"--workdir={run}", f"--model={merged}"):
        args = (source, f"--data={rows}", "--max_length=64", "--json")
        told = run_cli("evaluate", *args).ok().json
        ask = (source, "--prompt=Say 3:", "--template=raw", "--max_new_tokens=8")
        answer = run_cli("generate", *ask, "--json").ok().json
        assert told is not None and answer is not None
        found.append((told["loss"], answer["text"]))
    last = [row["loss"] for row in history(run) if row["split"] == "eval"]
    assert found[0][0] == pytest.approx(min(last), rel=1e-5)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_four_devices_give_the_losses_of_one(
    method: str, tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    for name, extra, devices in (
        ("one", (), 1),
        ("four", ("--config.mesh.data=2", "--config.mesh.fsdp=2"), 4),
    ):
        train(
            tiny_llama, rows, tmp_path / name, *extra, devices=devices, method=method
        ).ok()
    one, four = (
        [row["loss"] for row in history(tmp_path / name)] for name in ("one", "four")
    )
    np.testing.assert_allclose(four, one, rtol=1e-4)


def test_a_mapped_run_is_a_run_on_a_mesh(
    tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    """And continues from its own checkpoint."""
    fixed = (
        "--config.optim.schedule=constant",
        "--config.train.accumulate=2",
        "--config.train.batch_size=8",
    )
    by_map = (*fixed, "--config.parallel=pmap")
    meshed, mapped = tmp_path / "meshed", tmp_path / "mapped"
    train(tiny_llama, rows, meshed, *fixed, devices=4).ok()
    first = (*by_map, "--config.train.steps=3")
    train(tiny_llama, rows, mapped, *first, devices=4).ok()
    train(tiny_llama, rows, mapped, *by_map, devices=4).ok()
    one, other = history(meshed), history(mapped)
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for key in ("loss", "weight"):
        values = [[row[key] for row in run if key in row] for run in (other, one)]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_packed_and_unpacked_rows_have_the_same_loss(
    method: str, tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    found = []
    for packing in ("True", "False"):
        workdir = tmp_path / packing
        train(
            tiny_llama,
            rows,
            workdir,
            f"--config.data.packing={packing}",
            "--config.data.eval_rows=0",
            "--config.train.steps=1",
            method=method,
        ).ok()
        found.append(history(workdir)[0])
    packed, plain = found
    assert packed["split"] == plain["split"] == "eval"
    assert packed["tokens"] == plain["tokens"]
    assert packed["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert packed["token_accuracy"] == plain["token_accuracy"]
