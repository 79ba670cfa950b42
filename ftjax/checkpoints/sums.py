"""`SHA256SUMS`: what the weight files of a folder were when they were written.

The format of `sha256sum`, so that `sha256sum -c SHA256SUMS` checks them too. Where a
folder has one, a single flipped bit is found before the weights are used; where it has
none, weights are read unverified.
"""

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ftjax.checkpoints.jsonfile import inside, read_bytes
from ftjax.errors import UserError

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](\S+)")


def write_sums(folder: Path) -> None:
    """Hashes the weight files of a folder that is being written."""
    files = sorted(folder.glob("*.safetensors"))
    text = "".join(f"{digest}  {path.name}\n" for path, digest in _hashes(files))
    with (folder / SUMS).open("x", encoding="utf-8") as file:
        file.write(text)


def check_sums(folder: Path, files: Iterable[Path]) -> None:
    """Compares the files with the folder's `SHA256SUMS`, if it has one.

    Files that it does not list are not looked at.

    Raises:
      UserError: for a file that has changed, or a damaged list.
    """
    if not (folder / SUMS).exists():
        return
    path = inside(folder, SUMS, named_by=str(folder))
    known: dict[str, str] = {}
    for line in read_bytes(path).decode("utf-8", "replace").splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(
                "a list of hashes is damaged",
                where=path,
                expected="64 hexadecimal digits, two spaces, a file name",
                got=repr(line[:100]),
                fix="download it again, or delete it to go on unverified",
            )
        known[match[2]] = match[1]
    listed = [file for file in dict.fromkeys(files) if file.name in known]
    for file, digest in _hashes(listed):
        if digest != known[file.name]:
            raise UserError(
                "a weight file has changed since it was written",
                where=file,
                expected=f"sha256 {known[file.name][:16]}... ({SUMS})",
                got=f"sha256 {digest[:16]}...",
                fix="copy or download it again",
            )


def _hashes(files: list[Path]) -> list[tuple[Path, str]]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(4) as pool:
        return list(zip(files, pool.map(digest, files), strict=True))
