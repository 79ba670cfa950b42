"""The numbers of a run: `metrics.jsonl` is the truth, other writers are copies of it.

One JSON object per line, flushed line by line, so that a killed run loses at most the
line it was writing. A resumed run first cuts what came after the checkpoint it starts
from: a step appears once, whatever happened on the way.
"""

import json
import math
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

from ftjax.console import warn
from ftjax.errors import UserError

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
_TEXTS = ("split", "prompt", "text", "reference")

# JSON has no number for these; the strings are those of protobuf's JSON mapping.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricLog:
    """Appends to `metrics.jsonl` and `samples.jsonl`, TensorBoard and W&B beside them.

    Args:
      workdir: the folder of the run; it exists.
      resume_step: rows of later steps are cut; None starts both files anew.
      tensorboard: also write event files to `workdir/tensorboard`.
      wandb: also write to Weights & Biases.
      config: the run's config; `config["log"]["wandb_project"]` names the project.

    Raises:
      UserError: `wandb` is asked for and not installed.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        resume_step: int | None,
        tensorboard: bool = False,
        wandb: bool = False,
        config: dict[str, Any] | None = None,
    ):
        self._copies: dict[str, _Copy] = {}
        self._files: dict[str, TextIO] = {}
        for name in (METRICS, SAMPLES):
            cut_rows(workdir / name, -1 if resume_step is None else resume_step)
        if wandb:
            self._add("W&B", lambda: _WandbCopy(workdir, config or {}))
        if tensorboard:
            self._add("TensorBoard", lambda: _TensorBoardCopy(workdir, resume_step))
        for name in (METRICS, SAMPLES):
            self._files[name] = (workdir / name).open("a", encoding="utf-8")

    def write(self, step: int, split: str, **scalars: Any) -> None:
        """Writes one row; scalars are numbers or arrays of one element."""
        values = {name: _number(value) for name, value in scalars.items()}
        self._append(METRICS, {"step": int(step), "split": split, **values})
        named = {f"{split}/{name}": float(value) for name, value in values.items()}
        self._copy(lambda copy: copy.scalars(int(step), named))

    def write_sample(
        self, step: int, prompt: str, text: str, reference: str = "", **scalars: float
    ) -> None:
        """Writes one generation to `samples.jsonl`, perhaps with its reward."""
        row = {"prompt": prompt, "text": text, "reference": reference, **scalars}
        self._append(SAMPLES, {"step": int(step), **row})
        self._copy(lambda copy: copy.text(int(step), prompt, text))

    def close(self) -> None:
        """Closes every writer; safe to call twice."""
        self._copy(lambda copy: copy.close())
        self._copies.clear()
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        file = self._files[name]
        file.write(json.dumps(_encoded(row), ensure_ascii=False, allow_nan=False))
        file.write("\n")
        file.flush()

    def _add(self, name: str, make: Callable[[], "_Copy"]) -> None:
        try:
            self._copies[name] = make()
        except UserError:
            raise
        except Exception as error:
            _tell(name, error)

    def _copy(self, act: Callable[["_Copy"], None]) -> None:
        """Lets each copy act; one that fails is told of once and left out from then."""
        for name, copy in list(self._copies.items()):
            try:
                act(copy)
            except Exception as error:
                _tell(name, error)
                del self._copies[name]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; [] where there is none, other lines left out."""
    return [_decoded(row) for _, row in _lines(path) if row is not None]


def cut_rows(path: Path, last_step: int) -> int:
    """Drops rows after `last_step` and other lines; returns how many went.

    The file is replaced in one rename: a kill at any moment leaves the old or the new.
    """
    lines = list(_lines(path))
    kept = [line for line, row in lines if row and row["step"] <= last_step]
    if len(kept) < len(lines):
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    return len(lines) - len(kept)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(line, row) pairs; the row of a line that is torn, or not ours, is None."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith("\n") else None
            except json.JSONDecodeError:
                row = None
            yield line, row if _is_ours(row) else None


def _is_ours(row: Any) -> bool:
    """Whether it is a row as this file writes them: a step, texts and numbers."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    return all(
        isinstance(value, str)
        if name in _TEXTS
        else value in _NOT_FINITE
        if isinstance(value, str)
        else isinstance(value, int | float) and not isinstance(value, bool)
        for name, value in row.items()
    )


def _number(value: Any) -> int | float:
    """A Python number of a number or an array of one element (waits for the device)."""
    if isinstance(value, bool | int):
        return int(value)
    if not isinstance(value, float) and hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, int) else float(value)


def _encoded(row: dict[str, Any]) -> dict[str, Any]:
    def spelt(value: Any) -> Any:
        if not isinstance(value, float) or math.isfinite(value):
            return value
        if math.isnan(value):
            return "NaN"
        return "Infinity" if value > 0 else "-Infinity"

    return {name: spelt(value) for name, value in row.items()}


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _NOT_FINITE.get(value, value)
        if isinstance(value, str) and name not in _TEXTS
        else value
        for name, value in row.items()
    }


def _tell(name: str, error: Exception) -> None:
    reason = str(error).split("\n")[0] or type(error).__name__
    warn(f"{name} stopped working ({reason}); the run goes on, see {METRICS}")


class _Copy(Protocol):
    """A second place for the numbers, whose failures must not matter."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def text(self, step: int, prompt: str, text: str) -> None: ...

    def close(self) -> None: ...


class _TensorBoardCopy:
    def __init__(self, workdir: Path, resume_step: int | None):
        from tensorboardX import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, prompt: str, text: str) -> None:
        # Indented, so that TensorBoard's Markdown shows the text as it is.
        shown = f"{prompt}\n\n{text}".replace("\n", "\n    ")
        self._writer.add_text("samples", "    " + shown, step)

    def close(self) -> None:
        self._writer.close()


class _WandbCopy:
    def __init__(self, workdir: Path, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "log.wandb is on, but wandb is not installed",
                where="log.wandb",
                fix="pip install wandb, or set --config.log.wandb=False",
            ) from error
        name_file = workdir / "wandb_id"
        if not name_file.exists():
            name_file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=config.get("log", {}).get("wandb_project") or "ftjax",
            id=name_file.read_text().strip(),
            name=workdir.resolve().name,
            config=config,
            dir=str(workdir),
            resume="allow",
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def text(self, step: int, prompt: str, text: str) -> None:
        self._run.log({"samples": f"{prompt}\n\n{text}"}, step=step)

    def close(self) -> None:
        self._run.finish()
