"""A run on a stream: the losses of a file, and the same run after a kill."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from configs import orpo as orpo_config
from ftjax.checkpoints.state import Checkpoints
from ftjax.data.dataset import build_dataset
from ftjax.data.loader import Loader
from ftjax.data.tokenizer import Tokenizer, load_tokenizer
from ftjax.metrics import read_rows
from ftjax.models.decoder import Decoder
from ftjax.models.proj import init_params
from ftjax.models.spec import ModelSpec
from ftjax.objectives.causal import causal
from ftjax.objectives.orpo import orpo
from ftjax.step import Objective, mean_loss
from ftjax.streaming import META
from tests.cli import run_cli, start_cli
from tests.data.conftest import write_tokenizer
from tests.data.test_stream import lines, open_stream, rest, rows, settings

TIMES = ("time", "tokens_per_s")
SLOW = 900  # seconds that a command may take where much else runs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(write_tokenizer(folder / "plain"))


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> tuple[Decoder, Any]:
    size = tokenizer.vocab_size
    made = Decoder(ModelSpec("llama", size, 32, 2, 4, 2, 8, 48, tied=True))
    return made, jax.jit(partial(init_params, made))(jax.random.key(1))


def loss(objective: Objective, params: Any, batch: Any) -> dict[str, float]:
    """The loss, the means that were seen, and what was counted."""
    sums = objective.loss({"params": params}, {}, batch, None)
    found = {"loss": mean_loss(sums, objective.totals(batch)), **sums.metrics()}
    found |= objective.counted(batch)
    return {k: float(x) for k, x in found.items() if not np.isnan(x)}


ONLY = {
    "pair": ("prompt", "rejected"),
    "answer": ("prompt", "completion"),
    "text": ("text",),
}


@pytest.mark.parametrize("kind", ONLY)
def test_one_kind_alone_is_its_own_task(
    kind: str, tokenizer: Tokenizer, model: tuple[Decoder, Any], tmp_path: Path
) -> None:
    decoder, params = model
    config = orpo_config.get_config().loss
    some = [
        r for r in rows(16) if {*ONLY[kind]} <= {*r} and (kind != "pair" or len(r) > 2)
    ]
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines(some))
    stream = open_stream(tmp_path / "run", path, tokenizer, join_window=0)
    [batch] = rest(stream)
    reads = "mixed" if kind == "pair" else "answers"
    task = orpo(decoder, config)
    stored = build_dataset(
        str(path),
        tokenizer,
        settings(join_window=0),
        vocab_size=tokenizer.vocab_size,
        split="train",
        reads=reads,
    )
    loader = Loader(
        stored, length=stream.frame.length, packing=True, seed=0, shuffle=False
    )
    [expected] = loader.epoch(loader.rows_per_epoch)
    alone = task if kind == "pair" else causal(decoder, config.chunk)
    one, two = loss(task, params, batch), loss(alone, params, expected)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert one[f"tokens/{kind}"] > 0
    assert {k for k in one if k.startswith("nll/")} == {f"nll/{kind}"}
    if kind != "pair":
        assert one["loss"] == pytest.approx(one[f"nll/{kind}"], rel=1e-6)
        assert one[f"tokens/{kind}"] == expected["weights"].sum()


def test_the_parts_of_a_mixture_add_up(
    tokenizer: Tokenizer, model: tuple[Decoder, Any], tmp_path: Path
) -> None:
    decoder, params = model
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines(rows(20)))
    batch, *_ = rest(open_stream(tmp_path / "run", path, tokenizer))
    config = SimpleNamespace(
        **{**orpo_config.get_config().loss, "answer_weight": 0.5, "text_weight": 2.0}
    )
    task = orpo(decoder, config)
    found = loss(task, params, batch)
    kinds = {k: found[f"tokens/{k}"] for k in ONLY}
    assert sum(kinds.values()) == pytest.approx(float(task.totals(batch)["nll"]))
    nll = sum(found[f"nll/{k}"] * n for k, n in kinds.items()) / sum(kinds.values())
    odds = -config.beta * found["log_odds_ratio"]
    assert found["loss"] == pytest.approx(nll + odds, rel=1e-5)


def command(model: Path, source: Path, workdir: Path) -> tuple[str, ...]:
    return (
        "train",
        f"--config=configs/orpo.py:model={model}",
        f"--config.data.train={source}",
        "--config.data.stream=True",
        "--config.data.stream_wait=0.5",
        "--config.data.max_length=32",
        "--config.data.join_window=6",
        "--config.optim.warmup=0",
        "--config.train.steps=1000",
        "--config.train.batch_size=2",
        "--config.train.save_every=2",
        "--config.log.tensorboard=False",
        f"--workdir={workdir}",
        "--json",
    )


def history(workdir: Path) -> list[dict[str, Any]]:
    found = read_rows(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


def test_a_run_on_a_pipe_that_is_killed_is_the_run_that_is_not(
    tiny_llama: Path, tmp_path: Path
) -> None:
    data = lines(rows(48))
    file, pipe = tmp_path / "d.jsonl", tmp_path / "pipe"
    file.write_bytes(data)
    alone, workdir = tmp_path / "alone", tmp_path / "killed"
    told = run_cli(*command(tiny_llama, file, alone), timeout=SLOW).ok()
    assert told.json is not None and told.json[META]["ended"]
    assert told.json["steps"] == len(history(alone)) < 1000
    assert told.json[META]["joined"] > 0 and "pairs joined" in told.err
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)
    os.write(writer, data[: len(data) * 2 // 3])
    args, log = command(tiny_llama, pipe, workdir), tmp_path / "log"
    with start_cli(*args, log=log) as run:
        run.wait_for(workdir / "checkpoints" / "2", SLOW)
        assert run.stop(signal.SIGKILL).code == -signal.SIGKILL
    saved = Checkpoints(workdir / "checkpoints").meta(2)[META]
    assert 0 < saved["lines"] < 48 and saved["end"] is None
    os.write(writer, data[len(data) * 2 // 3 :])
    with start_cli(*args, log=log) as run:
        run.wait_for_line(workdir / "stream.jsonl", data.decode(), SLOW)
        os.close(writer)
        again = run.wait(SLOW).ok()
    assert "continuing after step" in again.out
    assert history(workdir) == history(alone)
    name = "adapter/adapter_model.safetensors"
    assert (workdir / name).read_bytes() == (alone / name).read_bytes()
    done = run_cli(*args, timeout=SLOW).ok()
    assert "done already" in done.err
    assert json.loads(done.out.splitlines()[-1])["steps"] == told.json["steps"]
