"""What makes a step directory a checkpoint: a manifest with a hash of every file.

Orbax does not notice a changed byte in array data, so each step is sealed: its files
are hashed and synced, then the manifest, which carries a hash of itself, is written.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftjax.errors import UserError
from ftjax.workdir import fsync_folder

FORMAT = 1  # of the step directory; raised when an older reader would misread it
MANIFEST = "manifest.json"
_THREADS = 4


class DamagedError(Exception):
    """A step directory is not what was saved; the text names the file."""


@dataclass(frozen=True)
class Leaf:
    """The shape and dtype of one saved array."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Manifest:
    """The contents of one checkpoint.

    Attributes:
      step: the step it was saved at.
      metric: the number that ranks it (lower is better); None if unknown or not finite.
      leaves: the saved arrays by path.
      files: size in bytes and SHA-256 of every file, by path inside the directory.
    """

    step: int
    metric: float | None
    leaves: dict[str, Leaf]
    files: dict[str, tuple[int, str]]


def seal(
    folder: Path, step: int, metric: float | None, leaves: dict[str, Leaf]
) -> Manifest:
    """Syncs and hashes all files of `folder`, then writes its manifest last."""
    names = sorted(_file_names(folder))
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(lambda n: _hash_file(folder / n, sync=True), names))
    if metric is not None and not math.isfinite(metric):
        metric = None
    files = dict(zip(names, entries, strict=True))
    manifest = Manifest(step, metric, leaves, files)
    with open(folder / MANIFEST, "x", encoding="utf-8") as file:
        file.write(_render({"format": FORMAT, **asdict(manifest)}))
        file.flush()
        os.fsync(file.fileno())
    for inner, _, _ in os.walk(folder):
        fsync_folder(Path(inner))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a step without looking at the other files.

    Raises:
      DamagedError: it is missing or not as written.
      UserError: it was written in another format.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        body = json.loads(text)["body"]
        intact = text == _render(body)
    except FileNotFoundError as error:
        raise DamagedError(f"file {MANIFEST} is missing") from error
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedError(f"file {MANIFEST}: {error}") from error
    if not intact:
        raise DamagedError(f"file {MANIFEST} does not match its own hash")
    if body["format"] != FORMAT:
        raise UserError(
            "this checkpoint was written by another version of ftjax",
            where=folder,
            expected=f"checkpoint format {FORMAT}",
            got=f"checkpoint format {body['format']}",
            fix="use the version that wrote it, or another --workdir",
        )
    return Manifest(
        step=body["step"],
        metric=body["metric"],
        leaves={
            k: Leaf(tuple(v["shape"]), v["dtype"]) for k, v in body["leaves"].items()
        },
        files={k: (size, digest) for k, (size, digest) in body["files"].items()},
    )


def verify(folder: Path) -> Manifest:
    """Reads the manifest and compares every file with it, smallest first.

    Raises:
      DamagedError: a file is missing, cut, or has a changed byte.
      UserError: it was written in another format.
    """
    manifest = read_manifest(folder)
    if str(manifest.step) != folder.name:
        raise DamagedError(f"file {MANIFEST} is of step {manifest.step}")
    for name, (size, _) in manifest.files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            raise DamagedError(f"file {name} is missing") from error
        if found != size:
            raise DamagedError(f"file {name} has {found} bytes, not {size}")
    names = list(manifest.files)
    with ThreadPoolExecutor(_THREADS) as pool:
        hashed = pool.map(lambda n: _try_hash(folder / n), names)
        for name, digest in zip(names, hashed, strict=True):
            if digest != manifest.files[name][1]:
                raise DamagedError(f"file {name} has changed since it was saved")
    return manifest


def _render(body: dict[str, Any]) -> str:
    """One text per body, so that any changed byte shows, even a space."""
    inner = json.dumps(body, sort_keys=True)
    digest = hashlib.sha256(inner.encode()).hexdigest()
    return json.dumps({"sha256": digest, "body": json.loads(inner)}, indent=1) + "\n"


def _file_names(folder: Path) -> Iterable[str]:
    for inner, _, names in os.walk(folder):
        for name in names:
            yield (Path(inner) / name).relative_to(folder).as_posix()


def _try_hash(path: Path) -> str:
    try:
        return _hash_file(path, sync=False)[1]
    except OSError as error:
        return f"unreadable: {error}"


def _hash_file(path: Path, *, sync: bool) -> tuple[int, str]:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
