"""Short runs: resumed to the same bits; what is saved is what is to be used."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import sft
from ftjax.checkpoints.arrays import read_arrays
from ftjax.checkpoints.manifest import read_manifest
from ftjax.config import validate
from ftjax.errors import UserError
from ftjax.policy import open_policy
from ftjax.train import run


def config(model: Path, rows: Path, name: str, method: str, steps: int) -> Any:
    c = sft.get_config(f"model={model},method={method}")
    c.data.train, c.data.eval = str(rows), ""
    c.data.max_length = 32
    c.optim.name, c.optim.schedule, c.optim.warmup = name, "constant", 1
    c.optim.lr = 1e-2
    c.train.steps, c.train.save_every, c.train.eval_every = steps, 2, 0
    c.train.batch_size, c.train.sample_rows, c.train.keep_best = 4, 0, 0
    c.log.tensorboard = False
    return c


def saved(workdir: Path, step: int) -> dict[str, np.ndarray]:
    folder = workdir / "checkpoints" / str(step)
    leaves = read_manifest(folder).leaves
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype))
        for name, leaf in leaves.items()
    }
    found = read_arrays(folder / "state", like)
    return {name: np.asarray(x) for name, x in found.items()}


@pytest.mark.parametrize(
    ("name", "method"),
    [("adamw8bit", "full"), ("muon", "lora"), ("schedule_free", "lora")],
)
def test_a_resumed_run_ends_in_the_same_bits(
    name: str, method: str, tiny_llama: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"Say {i}:", "completion": " word" * (i % 5 + 1)} for i in range(20)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    run(config(tiny_llama, rows, name, method, 4), str(straight))
    run(config(tiny_llama, rows, name, method, 2), str(parts))
    run(config(tiny_llama, rows, name, method, 4), str(parts))
    once, twice = saved(straight, 4), saved(parts, 4)
    assert once.keys() == twice.keys()
    for leaf, x in once.items():
        np.testing.assert_array_equal(x, twice[leaf], err_msg=leaf)
    assert any(x.dtype == np.uint8 for x in once.values()) == (name == "adamw8bit")
    if name == "schedule_free":
        _check_average(straight, once)


def _check_average(workdir: Path, state: dict[str, np.ndarray]) -> None:
    """The run that is opened has x, neither z nor y."""
    policy = open_policy(workdir=str(workdir))
    at = "lora/layers/mlp/up_proj/w/b"
    (z,) = (x for name, x in state.items() if name.endswith(f"/z/{at}"))
    used = policy.variables["lora"]["layers"]["mlp"]["up_proj"]["w"].b
    np.testing.assert_array_equal(used, state[f"trained/{at}"])
    assert np.abs(np.asarray(used) - z).max() > 1e-4


@pytest.mark.parametrize(
    ("method", "values", "words"),
    [
        ("lora", {"name": "adafactor", "b1": 0.9}, "config.optim.b1"),
        ("lora", {"name": "lion", "eps": 1e-8}, "b1, b2"),
        ("lora", {"name": "schedule_free"}, "schedule=constant"),
        ("full", {"b_lr_ratio": 16.0}, "b_lr_ratio=1"),
        ("lora", {"name": "sgd"}, "adafactor or lion or muon"),
        ("lora", {"schedule": "wsd", "decay": 0.0}, "above 0, at most 1"),
        ("lora", {"b2": 1.0}, "-1 (as usual)"),
    ],
)
def test_what_an_optimizer_does_not_have_is_refused(
    method: str, values: dict[str, Any], words: str
) -> None:
    c = sft.get_config(f"method={method}")
    validate(c)
    c.optim.update(values)
    with pytest.raises(UserError) as told:
        validate(c)
    assert words in told.value.screen()
