"""The folder of a run: writable, held by one process, never shared by two runs."""

import contextlib
import errno
import fnmatch
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ftjax.errors import EXIT_RESOURCES, UserError, disk_full
from ftjax.lock import Holder, release_lock, take_lock

# What may differ when a run is continued: how long it is, what it reports and keeps,
# and the machines it runs on. None of these changes what a step computes.
CHANGEABLE = (
    "train.steps",
    "train.epochs",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.sample_*",
    "train.max_skipped",
    "train.keep_*",
    "data.on_bad_row",
    "data.stream_wait",
    "mesh.*",
    "parallel",
    "log.*",
)
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR)
_NOT_SET = "(not set)"


@dataclass(frozen=True)
class Change:
    """A dotted key whose value differs from the one on record."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_show(self.old)} -> {_show(self.new)}"


class Workdir:
    """A run directory that this process holds until `close()`.

    Open it with `Workdir.open`; it is also a context manager.

    Attributes:
      path: the directory, absolute.
    """

    def __init__(self, path: Path, holder: Holder):
        self.path = path
        self._holder = holder

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, report: Callable[[str], None] = print
    ) -> Self:
        """Makes the directory with its parents, tries to write, and takes its lock.

        Raises:
          UserError: the path cannot be written to (exit 2), the disk is full (exit 4),
            or another process holds the directory (exit 5).
        """
        if not str(path):
            raise UserError("no run directory is named", fix="pass --workdir=DIR")
        try:
            folder = Path(path).expanduser().absolute()
            folder.mkdir(parents=True, exist_ok=True)
            _probe(folder)
            holder = take_lock(folder / "lock", report=report)
        except (OSError, ValueError) as error:
            raise _unusable(error, path) from error
        return cls(folder, holder)

    def close(self) -> None:
        """Gives the lock back, if it is still ours. May be called twice."""
        release_lock(self.path / "lock", self._holder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def save_config(self, config: Mapping[str, Any]) -> None:
        """Writes the resolved configuration to `config.json`."""
        write_json_atomic(self.path / "config.json", config)

    def saved_config(self) -> dict[str, Any] | None:
        """The configuration of the run that lives here, or None in a new directory."""
        path = self.path / "config.json"
        return read_json(path) if path.exists() else None

    def compare_config(
        self, config: Mapping[str, Any], allowed: Collection[str] = CHANGEABLE
    ) -> list[Change]:
        """Refuses to continue a run under another configuration; writes nothing.

        Args:
          config: nested plain values, as `ConfigDict.to_dict()` gives.
          allowed: dotted keys (with `*`) that may change.

        Returns:
          The allowed changes, for the user to be told of. Empty in a new directory.

        Raises:
          UserError: another key differs; every such key is listed with both values.
        """
        old = self.saved_config()
        if old is None:
            return []
        return compare_values(
            old,
            config,
            what="this run directory holds a run with another configuration",
            where=self.path / "config.json",
            allowed=allowed,
            fix="use another --workdir, or the values that the run began with",
        )


def compare_values(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    what: str,
    where: str | os.PathLike[str] | None = None,
    allowed: Collection[str] = (),
    fix: str | None = None,
) -> list[Change]:
    """Compares a record of a run (configuration, fingerprints) with today's values.

    Nested mappings are compared by dotted key, as JSON: a tuple equals a list.

    Args:
      old: the values on record.
      new: the values now.
      what: the first line of the error if they differ.
      where: the file of the record.
      allowed: dotted keys (with `*`) that may differ.
      fix: what the user can do.

    Returns:
      The allowed changes.

    Raises:
      UserError: another key differs.
    """
    before, after = _flatten(old), _flatten(new)
    changes = [
        Change(key, before.get(key, _NOT_SET), after.get(key, _NOT_SET))
        for key in sorted(before.keys() | after.keys())
        if before.get(key, _NOT_SET) != after.get(key, _NOT_SET)
    ]
    refused = [c for c in changes if not _matches(c.key, allowed)]
    if refused:
        free = ", ".join(allowed)
        raise UserError(
            what,
            where=where,
            expected=f"the same values (these may change: {free})" if free else None,
            got="\n".join(map(str, refused)),
            fix=fix,
        )
    return changes


def write_json_atomic(path: Path, value: Any) -> None:
    """Writes `value` as JSON so that a reader finds the old file or the new one.

    Raises:
      UserError: the disk is full (exit 4) or the folder not writable (exit 2).
    """
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temp, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
        fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temp.unlink(missing_ok=True)
        told = storage_error(error, path)
        if told is None:
            raise
        raise told from error


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run.

    Raises:
      UserError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            "a file of this run is damaged", where=path, got=str(error)
        ) from error


def fsync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable: a rename alone may be lost with power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_space(folder: Path, needed: int, what: str = "this") -> None:
    """Raises a `UserError` (exit 4) unless `needed` bytes are free under `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"not enough disk space for {what}",
            where=folder,
            expected=f"{needed / 1e6:,.1f} MB free",
            got=f"{free / 1e6:,.1f} MB free",
            fix="free some space, or use a --workdir on another disk",
            code=EXIT_RESOURCES,
        )


def storage_error(error: BaseException, path: Path) -> UserError | None:
    """What to tell the user of a failed write, or None if it is not about storage."""
    if full := disk_full(error, path):
        return full
    number = error.errno if isinstance(error, OSError) else None
    if number in _UNWRITABLE:
        return UserError(
            "the run directory can no longer be written to",
            where=path,
            got=os.strerror(number or errno.EACCES),
            fix="check that it still exists and that its disk is mounted read-write",
        )
    return None


def _unusable(error: Exception, path: str | os.PathLike[str]) -> Exception:
    if full := disk_full(error, path):
        return full
    reason = error.strerror if isinstance(error, OSError) else str(error)
    blocker = getattr(error, "filename", None)
    if isinstance(error, FileExistsError):
        reason = "it is a file, or a link to nothing"
    return UserError(
        "the run directory cannot be used",
        where=path,
        expected="a folder that can be made and written to",
        got=f"{reason}: {blocker}" if blocker else reason,
        fix="name another one with --workdir",
    )


def _probe(folder: Path) -> None:
    """Writes and removes a file: permission bits say nothing to root or to a mount."""
    probe = folder / f".probe.{secrets.token_hex(4)}"
    try:
        with open(probe, "xb") as file:
            file.write(b"ok")
    finally:
        probe.unlink(missing_ok=True)


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    visit("", json.loads(json.dumps(tree)))
    return flat


def _matches(key: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _show(value: Any) -> str:
    return value if value == _NOT_SET else json.dumps(value)
