"""Files from strangers: JSON within limits, and paths that stay in their folder."""

import json
from pathlib import Path
from typing import Any

from ftjax.errors import UserError

_LIMIT = 16 * 2**20


def inside(folder: Path, name: str, *, named_by: str) -> Path:
    """The file `name` of a model folder, if it really lies in that folder.

    A symlink may lead only to where the Hub's own cache keeps its files:
    `models--org--name/snapshots/<commit>/file` -> `models--org--name/blobs/<hash>`.

    Raises:
      UserError: for an absolute path, `..`, or a link that leads elsewhere.
    """
    parts = Path(name).parts
    odd = not name or "\\" in name or "\0" in name or ".." in parts
    root = folder.resolve()
    if not odd and not Path(name).is_absolute():
        path = folder / name
        try:
            target = path.resolve()
        except (OSError, RuntimeError, ValueError):
            target = Path()  # a loop of links, or no name that a file can have
        if target.is_relative_to(root) or target.parent == _blobs(root):
            return path
    raise UserError(
        "a file name leads out of the model's folder",
        where=named_by,
        expected=f"a file inside {root}",
        got=repr(name[:200]),
        fix="copy the files into one folder; do not use this checkpoint if it came so",
    )


def _blobs(root: Path) -> Path | None:
    repo = root.parent.parent
    cached = root.parent.name == "snapshots" and repo.name.startswith("models--")
    return repo / "blobs" if cached else None


def what_it_is(head: bytes) -> str | None:
    """What a file that should be JSON or weights is instead, by its first bytes."""
    text = head[:512].lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer: the file itself was never downloaded (git lfs pull)"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML page: the download ended at an error or login page"
    # A safetensors file may begin so too: with a length, and then comes JSON.
    pickled = head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04"))
    if pickled and head[8:9] != b"{":
        return "a pickle or zip (PyTorch) file, which is never opened"
    if text.startswith((b"entry not found", b"access to model", b"repository not")):
        return "an error message of the Hub: " + head[:80].decode("utf-8", "replace")
    return None


def read_bytes(path: Path, limit: int = _LIMIT) -> bytes:
    """The contents of a regular file of at most `limit` bytes.

    Raises:
      UserError: if it is missing, unreadable, not a regular file, or too large.
    """
    try:
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "a special file"
            kind = kind if path.exists() else "no such file"
            kind = "a link to a file that is gone" if _dangling(path) else kind
            raise UserError("a model file is missing", where=path, got=kind)
        size = path.stat().st_size
        if size > limit:
            raise UserError(
                "a text file of the model is far too large",
                where=path,
                expected=f"at most {limit:,} bytes",
                got=f"{size:,} bytes",
            )
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            "a model file cannot be read", where=path, got=error.strerror or str(error)
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may be damaged or hostile.

    Raises:
      UserError: naming the file and, where there is one, line and column.
    """
    return parse_object(read_bytes(path), path)


def parse_object(data: bytes, where: Path | str) -> dict[str, Any]:
    """`data` as one JSON object: strict UTF-8, no duplicate keys, no NaN."""
    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constants,
        )
    except (ValueError, RecursionError) as error:
        cause = what_it_is(data)
        problem = str(error) if not isinstance(error, RecursionError) else "too deep"
        raise UserError(
            "a model file is not valid JSON",
            where=where,
            got=cause or problem,
            fix="download it again",
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            "a model file does not hold a JSON object",
            where=where,
            expected="{...}",
            got=type(value).__name__,
        )
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:200]!r} occurs twice")
        found[key] = value
    return found


def _no_constants(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _dangling(path: Path) -> bool:
    return path.is_symlink() and not path.exists()
