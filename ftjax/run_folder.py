"""Reads the folder of a run: its saved JSON, and which step of it to use."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ftjax.checkpoints.manifest import MANIFEST
from ftjax.checkpoints.state import Checkpoints
from ftjax.errors import UserError
from ftjax.ranges import check_ranges
from ftjax.workdir import read_json

CONFIG = "config.json"
SECTIONS = {"model", "method", "quant", "data", "loss", "train", "rollout", "reward"}


def read_run_config(workdir: str) -> dict[str, Any]:
    """The configuration that a run was started with, from its `config.json`.

    Raises:
      UserError: if this is no run directory, or a value cannot be.
    """
    folder = Path(workdir).expanduser()
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if not is_run(config):
        is_model = "model_type" in config
        raise UserError(
            "this is not the folder of a run",
            where=folder,
            expected="config.json and checkpoints/, as ftjax.train leaves them",
            got=None if folder.is_dir() else "no such folder",
            fix=f"pass it as --model={workdir}" if is_model else None,
        )
    for name in SECTIONS & config.keys():
        if not isinstance(config[name], dict):
            raise UserError(
                "a section of a configuration is none",
                where=f"{folder / CONFIG}: {name}",
                expected="an object",
                got=repr(config[name])[:100],
                fix="restore the file; every checkpoint belongs to one configuration",
            )
    check_ranges(config, f"{folder / CONFIG}: ")
    return config


class MissingKey(UserError, AttributeError):
    """A key that a run's configuration does not have; `getattr` takes its default."""


class Section(SimpleNamespace):
    """A section of a saved configuration, its keys as attributes."""

    def __getattr__(self, key: str) -> Any:
        raise MissingKey(
            f"the run's configuration has no `{key}`",
            where=CONFIG,
            expected="the keys of the configuration that the run was made with",
            got=", ".join(vars(self))[:200],
            fix="restore the file, or add the key with its usual value",
        )


def is_run(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is that of a run; a model has such a file too."""
    return {"model", "method", "data"} <= config.keys()


def is_run_folder(path: str) -> bool:
    """Whether a folder is that of a run; one that is not there is none."""
    file = Path(path).expanduser() / CONFIG
    return file.is_file() and is_run(read_json(file))


def run_hash(workdir: str) -> str:
    """The hash of the checkpoint of a run that is used: 16 hex digits.

    Raises:
      UserError: this is no run directory, or there is no checkpoint.
    """
    read_run_config(workdir)
    saved = Checkpoints(Path(workdir).expanduser() / "checkpoints")
    step, _ = choose_step(saved, "auto")
    manifest = (saved.dir / str(step) / MANIFEST).read_bytes()
    return hashlib.blake2b(manifest, digest_size=8).hexdigest()


def choose_step(saved: Checkpoints, weights: str) -> tuple[int, str]:
    best = saved.best() if weights != "last" else None
    if best is not None:
        return best, "best by eval loss"
    last = saved.latest() if weights != "best" else None
    if last is not None:
        return last, "last"
    raise UserError(
        "the run has no checkpoint to use"
        if weights != "best"
        else "the run has kept no best checkpoint",
        where=saved.dir,
        fix="let it train until its first save"
        if weights != "best"
        else "--weights=last, or train with data.eval and train.keep_best=1",
    )
