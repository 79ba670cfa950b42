"""The commands of the fault tests, on files that a test has written."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.cli import Result, run_cli

PAIRS = [
    {"prompt": f"What is {i} and {i}?", "completion": f" It is {2 * i}."}
    for i in range(12)
]
TALK = [
    {"role": "user", "content": "Say one."},
    {"role": "assistant", "content": "One."},
]
QUICK = (
    "--config.data.eval=",
    "--config.data.max_length=64",
    "--config.optim.warmup=0",
    "--config.train.steps=2",
    "--config.train.batch_size=2",
    "--config.train.sample_rows=0",
    "--config.log.tensorboard=False",
)
KEPT_AFTER_A_REFUSAL = {"error.txt"}  # the traceback, for those who ask for it


def options(
    model: str | Path, data: str | Path, *more: str, method: str = "lora"
) -> tuple[str, ...]:
    """The flags of `train` and `check` for a small run; those in `more` win."""
    return (
        f"--config=configs/sft.py:method={method}",
        f"--config.model.path={model}",
        f"--config.data.train={data}",
        *QUICK,
        *more,
    )


def check(
    model: str | Path, data: str | Path, *more: str, method: str = "lora"
) -> Result:
    return run_cli("check", *options(model, data, *more, method=method), "--json")


def finished_run(model: Path, data: Path, workdir: Path) -> Path:
    """The directory of a short LoRA run that has ended."""
    flags = options(model, data, "--config.optim.lr=0.01", f"--workdir={workdir}")
    run_cli("train", *flags).ok()
    return workdir


def evaluate(model: Path, data: Path, *more: str) -> Result:
    return run_cli("evaluate", f"--model={model}", f"--data={data}", "--json", *more)


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def messages(*turns: tuple[str, str]) -> dict[str, Any]:
    """A row of `messages` from (role, content) pairs."""
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def copy_model(model: Path, to: Path) -> Path:
    """A copy of a checkpoint that the test may spoil."""
    return Path(shutil.copytree(model, to))


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; a value of `...` deletes the key."""
    value = json.loads(path.read_text("utf-8")) | changes
    kept = {key: item for key, item in value.items() if item is not ...}
    path.write_text(json.dumps(kept, indent=2), "utf-8")


def edit_weights(model: Path, **changes: np.ndarray | None) -> None:
    """Replaces tensors by name ('__' stands for '.'); None deletes one."""
    file = model / "model.safetensors"
    tensors = {name: value.copy() for name, value in load_file(file).items()}
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt"})


def weights(model: Path) -> dict[str, np.ndarray]:
    return load_file(model / "model.safetensors")


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file under a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_no_run(workdir: Path) -> None:
    """A refused command leaves nothing that looks like a run."""
    left = set(contents(workdir)) if workdir.exists() else set()
    assert left <= KEPT_AFTER_A_REFUSAL, left
