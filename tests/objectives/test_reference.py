"""The reference's numbers are the base's, wherever they come from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from configs import dpo as dpo_config
from ftjax import cli, evaluate, train
from ftjax.errors import Stopped
from ftjax.objectives.dpo import REFERENCE, pair_logps
from ftjax.prepare import Prepared, load_variables, prepare
from ftjax.reference import add_reference
from ftjax.sharding import batch_sharding, put_batch

ROWS = [
    {"prompt": f"Say {i}:", "chosen": " one two"[: 3 + i], "rejected": " no" * (i + 1)}
    for i in range(6)
]

FROZEN_CODES = {
    "method__layers": 0,
    "method__pattern": "q_proj",
    "quant__format": "int8",
    "quant__targets": "up_proj",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def started(
    model: Path,
    data: Path,
    workdir: Path,
    method: str,
    stopping: Callable[[], bool] = lambda: False,
    **changes: Any,
) -> tuple[Prepared, Any]:
    """(what a run has prepared, what of it is frozen), after its reference was read."""
    config = dpo_config.get_config(f"model={model},method={method}")
    config.data.update({"train": str(data), "eval": "", "max_length": 64})
    config.train.update({"steps": 2, "batch_size": 4})
    config.optim.warmup = 0
    if init := changes.pop("init", None):
        config.method.init = init
    config.loss.update(changes)
    ready = prepare(config)
    trained, frozen, _ = load_variables(config, ready.base, ready.shape, ready.mesh)
    add_reference(config, ready, trained, frozen, workdir, stopping)
    return ready, frozen


def numbers(ready: Prepared) -> np.ndarray:
    """[pairs, 2], as they stand beside the groups."""
    values = ready.data.train.values
    return np.stack([values[name] for name in REFERENCE], axis=1)


def test_all_references_are_one(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    """In the step, known before, of a copy, and where the base is trained or apart."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    ready, frozen = started(tiny_llama, data, tmp_path, "lora")
    assert REFERENCE[0] not in ready.data.train.values
    loader = ready.data.loader
    assert loader is not None
    [(batch, groups)] = loader.epoch_groups(4)
    sent = put_batch(batch, batch_sharding(ready.mesh))
    loss = SimpleNamespace(chunk=64, ld_alpha=1.0)
    sums = jax.jit(lambda v, b: pair_logps(ready.shape.model, v, b, loss))(frozen, sent)
    expected = np.zeros((len(ROWS), 2), np.float32)
    for row, members in enumerate(groups):
        expected[members] = np.asarray(sums)[row, : len(members)]
    assert (expected < 0).all()
    others: dict[str, tuple[str, dict[str, Any]]] = {
        "precomputed": ("lora", {"precompute": True}),
        "full": ("full", {}),
        "prompt": ("prompt", {"precompute": True}),
        "copy": ("freeze", {"reference": str(copy)}),
        "pissa": ("lora", {"init": "pissa"}),
    }
    for name, (method, changes) in others.items():
        workdir = tmp_path / f"run-{name}"
        workdir.mkdir()
        found, _ = started(tiny_llama, data, workdir, method, **changes)
        np.testing.assert_allclose(numbers(found), expected, rtol=1e-5, err_msg=name)
        assert len(list((workdir / "reference").glob("train-*.npy"))) == 1


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("full", {}),
        ("lora", {"method__also_train": "norm"}),
        ("qlora", {"method__init": "pissa", "method__also_train": "norm"}),
        ("qlora", {"method__init": "loftq", "method__loftq_iters": 2}),
        ("freeze", FROZEN_CODES),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else "-".join(map(str, value.values()))
    ),
)
def test_the_command_compares_with_what_the_run_compared_with(
    method: str, changes: dict[str, Any], tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    config = dpo_config.get_config(f"model={tiny_llama},method={method}")
    config.data.update({"train": str(data), "eval": str(data), "max_length": 64})
    config.train.update({"steps": 3, "batch_size": 4, "eval_every": 3})
    config.optim.update({"lr": 1e-2, "warmup": 0})
    config.log.tensorboard = False
    for name, value in changes.items():
        section, _, key = name.partition("__")
        config[section][key] = value
    told = train.run(config, str(tmp_path / "run"))["eval"]
    argv = [f"--workdir={tmp_path / 'run'}", f"--data={data}", "--weights=last"]
    args = cli.parse(argv, evaluate.define, config=True)
    assert args is not None
    found = evaluate.main(args)
    assert abs(told["rewards/margins"]) > 1e-3
    for name in ("loss", "rewards/margins", "logps/rejected"):
        assert found[name] == pytest.approx(told[name], rel=2e-5), name


def test_a_damaged_file_is_made_again(
    tiny_llama: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ready, _ = started(tiny_llama, data, tmp_path, "full")
    [file] = (tmp_path / "reference").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-5], whole[:40]):
        file.write_bytes(damaged)
        again, _ = started(tiny_llama, data, tmp_path, "full")
        np.testing.assert_array_equal(numbers(again), numbers(ready))
        assert file.read_bytes() == whole
        assert "is damaged" in capsys.readouterr().err


def test_a_stop_is_heard_while_it_reads(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stopped, match="nothing is kept"):
        started(tiny_llama, data, tmp_path, "full", stopping=lambda: True)
    assert not (tmp_path / "reference").exists()
