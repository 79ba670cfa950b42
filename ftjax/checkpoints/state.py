"""The states of a run on disk: committed or absent, verified before use.

A step is written to a temporary folder, sealed with a manifest of hashes, and becomes
visible by one rename. It leaves by one rename too, into a trash folder. So a kill at
any time leaves only whole steps under numeric names.

    checkpoints/40/state/         the arrays (Orbax)
    checkpoints/40/meta.json      what the caller wants to know before it restores
    checkpoints/40/manifest.json  leaves, metric, size and hash of every file
"""

import contextlib
import json
import operator
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from ftjax.checkpoints.arrays import (
    describe,
    flatten,
    nbytes,
    read_arrays,
    require_match,
    write_arrays,
)
from ftjax.checkpoints.manifest import (
    FORMAT,
    DamagedError,
    Manifest,
    read_manifest,
    seal,
    verify,
)
from ftjax.errors import UserError
from ftjax.workdir import fsync_folder, require_space, storage_error

PyTree = Any

_LEFTOVER = re.compile(r"\.(tmp|trash)-(\d+)")
_REPLACED = re.compile(r"(\d+)\.replaced")
_SLACK = 1 << 20  # bytes that Orbax and the manifest add to the arrays


class Checkpoints:
    """Saves, lists, verifies, restores and retires the steps of one run.

    Reading never changes the folder, so that others may look while a run writes. The
    writer must be alone (`Workdir` sees to it); call `clean` when it starts.
    """

    def __init__(
        self,
        dir: Path,
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        report: Callable[[str], None] = print,
    ):
        """Makes nothing on disk yet.

        Args:
          dir: the folder of the steps; its parent must exist when a step is saved.
          keep_last: how many of the newest steps stay.
          keep_best: how many of the steps with the lowest metric stay besides.
          report: is told, in one line each, what was damaged, left over or moved.

        Raises:
          UserError: the numbers would keep no step.
        """
        if keep_last < 1 or keep_best < 0:
            raise UserError(
                "these settings keep no checkpoint",
                where="train.keep_last, train.keep_best",
                expected="keep_last at least 1, keep_best at least 0",
                got=f"keep_last={keep_last}, keep_best={keep_best}",
            )
        self.dir = Path(dir).absolute()
        self._keep_last, self._keep_best = keep_last, keep_best
        self._report = report
        self._good: dict[int, Any] = {}  # verified steps, with the stamp they had then
        self._bad: dict[int, str] = {}  # damaged steps that the user was told of
        self._cleaned = False

    def steps(self) -> list[int]:
        """The steps on disk, oldest first, damaged ones included."""
        if not self.dir.is_dir():
            return []
        return sorted(
            int(entry.name)
            for entry in self.dir.iterdir()
            if re.fullmatch("0|[1-9][0-9]*", entry.name) and _is_filled(entry)
        )

    def latest(self) -> int | None:
        """The newest undamaged step, or None where nothing has been saved.

        Raises:
          UserError: every step is damaged, or the newest is of another format.
        """
        step, damaged = self._first_good(reversed(self.steps()))
        if step is None and damaged:
            raise UserError(
                "every checkpoint of this run is damaged",
                where=self.dir,
                got="\n".join(f"step {step}: {why}" for step, why in damaged.items()),
                fix="restore them from a copy, or start anew in another --workdir; "
                "nothing was deleted",
            )
        return step

    def best(self) -> int | None:
        """The undamaged step with the lowest metric (the newest of equals), or None.

        Raises:
          UserError: such a step is of another format.
        """
        step, damaged = self._first_good(self._ranked(self._manifests()))
        if step is None:
            for bad, why in damaged.items():
                self._report(f"step {bad} is damaged ({why}): no best step is left")
        return step

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as `meta`, with `step` and `format`; verified.

        Raises:
          UserError: the step is absent, damaged or of another format.
        """
        self._verified(step)
        return json.loads((self._path(step) / "meta.json").read_text("utf-8"))

    def restore(self, step: int, like: PyTree, *, partial: bool = False) -> PyTree:
        """Reads a step onto the shardings of `like`, bit for bit.

        Args:
          step: a step of `steps()`.
          like: a pytree of `jax.ShapeDtypeStruct` or arrays; a leaf without a sharding
            goes to the first device. The mesh may differ from the one of the save.
          partial: whether `like` may have only some of the saved leaves.

        Returns:
          A tree like `like`, of arrays.

        Raises:
          UserError: the step is absent or damaged, or a path, shape or dtype differs.
        """
        manifest = self._verified(step)
        wanted = flatten(like)
        folder = self._path(step)
        require_match(manifest.leaves, describe(wanted), where=folder, partial=partial)
        arrays = read_arrays(folder / "state", wanted)
        return jax.tree.unflatten(
            jax.tree.structure(like), [arrays[name] for name in wanted]
        )

    def save(
        self,
        step: int,
        state: PyTree,
        meta: dict[str, Any],
        metric: float | None = None,
    ) -> None:
        """Commits a step, then retires old ones. An existing step is replaced.

        When it returns the step is on disk and named. When it raises, the temporary
        files are gone and the older steps are as they were.

        Args:
          step: its number.
          state: a pytree of arrays.
          meta: anything that JSON can hold.
          metric: what `best` goes by, lower is better; NaN and None never win.

        Raises:
          UserError: the disk is full (exit 4), or the folder not writable (exit 2).
        """
        step = operator.index(step)
        score = None if metric is None else float(metric)
        flat = flatten(state)
        text = json.dumps({**meta, "step": step, "format": FORMAT}, indent=1)
        temp = self.dir / f".tmp-{step}-{secrets.token_hex(4)}"
        try:
            if not self._cleaned:
                self.clean()
            self.dir.mkdir(exist_ok=True)
            require_space(self.dir, nbytes(flat) + _SLACK, f"saving step {step}")
            temp.mkdir()
            write_arrays(temp / "state", flat)
            (temp / "meta.json").write_text(text, "utf-8")
            seal(temp, step, score, describe(flat))
            self._publish(temp, step)
        except BaseException as error:
            self._remove(temp)
            self._cleaned = False  # what would not go now may go before the next save
            told = storage_error(error, self.dir)
            if told is None:
                raise
            raise told from error
        self._retire(step)

    def clean(self) -> None:
        """Removes what a killed run left. For the writer only, before it saves."""
        self._cleaned = True
        for entry in list(self.dir.iterdir()) if self.dir.is_dir() else []:
            if left := _LEFTOVER.match(entry.name):
                self._remove(entry)
                if left[1] == "tmp":
                    self._report(f"removed an unfinished save of step {left[2]}")
            elif old := _REPLACED.fullmatch(entry.name):
                # Killed between the two renames of a replacement, or just after them.
                if _is_filled(self._path(int(old[1]))):
                    self._trash(entry)
                else:
                    os.rename(entry, self._path(int(old[1])))

    def wait(self) -> None:
        """Returns once every save is committed: at once, for `save` itself commits."""

    def close(self) -> None:
        """Ends the use of the folder; nothing is pending after a `save`."""
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _path(self, step: int) -> Path:
        return self.dir / str(step)

    def _verified(self, step: int) -> Manifest:
        folder = self._path(step)
        if not _is_filled(folder):
            have = ", ".join(map(str, self.steps())) or "none"
            raise UserError(
                f"there is no checkpoint of step {step}",
                where=self.dir,
                expected=f"one of the saved steps: {have}",
            )
        if fault := self._fault(step):
            raise UserError(
                f"the checkpoint of step {step} is damaged",
                where=folder,
                got=fault,
                fix="use another step",
            )
        return read_manifest(folder)

    def _fault(self, step: int) -> str | None:
        """What is wrong with a step; hashes it unless it is as last time."""
        folder = self._path(step)
        stamp = _stamp(folder)
        if self._good.get(step) == stamp:
            return None
        try:
            verify(folder)
        except DamagedError as error:
            return str(error)
        self._good[step] = stamp
        self._bad.pop(step, None)
        return None

    def _first_good(self, steps: Iterable[int]) -> tuple[int | None, dict[int, str]]:
        """The first undamaged step, and the damaged ones before it."""
        damaged: dict[int, str] = {}
        for step in steps:
            fault = self._fault(step)
            if fault is None:
                for bad, why in sorted(damaged.items() - self._bad.items()):
                    text = f"step {bad} is damaged ({why}): using step {step}"
                    self._report(text)
                self._bad |= damaged
                return step, damaged
            damaged[step] = fault
        return None, damaged

    def _manifests(self) -> dict[int, Manifest]:
        """The steps whose manifest can be read and which are not known as damaged."""
        found = {}
        for step in self.steps():
            if step not in self._bad:
                with contextlib.suppress(
                    DamagedError, UserError
                ):  # latest() speaks of them
                    found[step] = read_manifest(self._path(step))
        return found

    @staticmethod
    def _ranked(manifests: dict[int, Manifest]) -> list[int]:
        scores = {s: m.metric for s, m in manifests.items() if m.metric is not None}
        return sorted(scores, key=lambda step: (scores[step], -step))

    def _publish(self, temp: Path, step: int) -> None:
        target, old = self._path(step), None
        if _is_filled(target):
            if fault := self._fault(step):
                aside = self.dir / f"{step}.damaged-{secrets.token_hex(3)}"
                self._report(f"step {step} is damaged ({fault}): moved to {aside}")
                os.rename(target, aside)
            else:
                old = self.dir / f"{step}.replaced"
                os.rename(target, old)
        os.rename(temp, target)
        fsync_folder(self.dir)
        self._bad.pop(step, None)
        self._good[step] = _stamp(target)
        if old:
            self._trash(old)

    def _retire(self, saved: int) -> None:
        manifests = self._manifests()
        # A run that went back to an older step may save below newer ones.
        keep = {saved, *sorted(manifests)[-self._keep_last :]}
        keep.update(self._ranked(manifests)[: self._keep_best])
        for step in manifests.keys() - keep:
            self._good.pop(step, None)
            self._trash(self._path(step))

    def _trash(self, folder: Path) -> None:
        """Takes the name away first: a step half deleted must not be listed."""
        step = folder.name.partition(".")[0]
        trash = self.dir / f".trash-{step}-{secrets.token_hex(4)}"
        try:
            os.rename(folder, trash)
        except OSError as error:
            self._report(f"could not delete {folder}: {error}")
        else:
            self._remove(trash)

    def _remove(self, folder: Path) -> None:
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            self._report(f"could not delete {folder}: {error}")


def _is_filled(folder: Path) -> bool:
    """Whether it is a folder with anything in it."""
    return folder.is_dir() and any(folder.iterdir())


def _stamp(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of all files: unchanged means still verified."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
