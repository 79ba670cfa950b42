"""Every task runs with every method, packed, from its own configuration."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ftjax import train
from ftjax.checkpoints.state import Checkpoints
from ftjax.methods.method import METHODS as KNOWN
from ftjax.objectives.tasks import TASKS
from ftjax.prepare import load_variables, prepare
from ftjax.run_folder import CONFIG
from tests.faults.commands import write_rows

METHODS = (
    "full",
    "freeze",
    "lora",
    "qlora",
    "vera",
    "ia3",
    "bottleneck",
    "prompt",
    "prefix",
)
WORDS = ["", "the", "thing", "in", "a", "re", "end", "on", "is", "what", "it"]


def row(task: str, i: int) -> dict[str, Any]:
    """A row that the task reads."""
    prompt, good, bad = (f" {WORDS[(i * k) % 9 + 1]}" for k in (1, 2, 5))
    if task == "generic":
        return {"text": prompt + good + bad}
    if task in ("sft", "distill"):
        return {"prompt": prompt, "completion": good + bad}
    if task in ("grpo", "ppo"):
        return {"prompt": prompt}
    return {"prompt": prompt, "chosen": good, "rejected": bad + " end"}


def config_of(task: str, method: str, model: Path, data: Path) -> Any:
    c = importlib.import_module(f"configs.{task}").get_config(
        f"model={model},method={method}"
    )
    c.data.train, c.data.eval, c.data.max_length = str(data), str(data), 64
    c.optim.lr, c.optim.warmup = 1e-2, 0
    c.train.update({"steps": 4, "batch_size": 8, "eval_every": 4, "sample_rows": 0})
    c.log.tensorboard = False
    if task == "distill":
        c.loss.teacher = str(model)
        c.loss.nll_weight = 0.5  # the teacher is the student, as it begins
    if "rollout" in c:
        c.rollout.update({"group": 4, "max_new_tokens": 8})
        c.train.save_every = 4
    return c


def test_all_methods_are_here() -> None:
    assert set(KNOWN) == set(METHODS) - {"qlora"}


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_it_runs_and_trains(
    task: str, method: str, tiny_llama: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [row(task, i) for i in range(24)])
    config = config_of(task, method, tiny_llama, data)
    found = train.run(config, str(tmp_path / "run"))
    assert math.isfinite(found["eval"]["loss"])
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in rows]
    assert all(isinstance(loss, float) for loss in losses) and len(losses) >= 3
    saved = json.loads((tmp_path / "run" / CONFIG).read_text())
    assert (saved["quant"]["format"] == "nf4") == (method == "qlora")
    assert changed(config, tmp_path / "run")


def changed(config: Any, run: Path) -> bool:
    """Whether the last checkpoint holds other numbers than the run began with."""
    ready = prepare(config)
    begun, _, _ = load_variables(config, ready.base, ready.shape, ready.mesh)
    after = Checkpoints(run / "checkpoints").restore(
        4, {"trained": begun}, partial=True
    )
    pairs = zip(jax.tree.leaves(begun), jax.tree.leaves(after["trained"]), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)
