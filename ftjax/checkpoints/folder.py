"""A folder that is there whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from ftjax.errors import UserError
from ftjax.workdir import fsync_folder, storage_error


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder by filling a temporary one beside it, then renaming that.

    The files are with the disk before the name is. A kill on the way leaves a hidden
    folder `.NAME.tmp-...` and never a half-written `NAME`.

    Args:
      target: must not exist.
      fill: writes into the empty folder that it is given.

    Raises:
      UserError: the target exists or cannot be made (exit 2); the disk is full (4).
    """
    refuse_existing(target)
    target = target.absolute()
    temp = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
    try:
        temp.mkdir(parents=True)
        fill(temp)
        for folder, _, files in os.walk(temp):
            for name in files:
                _fsync_file(Path(folder, name))
            fsync_folder(Path(folder))
        refuse_existing(target)
        os.rename(temp, target)
        fsync_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(temp, ignore_errors=True)
        told = storage_error(error, target)
        if told is None:
            raise
        told.fix = "free some space, or write to another place"
        raise told from error


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Writes a folder that ftjax made itself anew; the old one goes when this is whole.

    Only where nobody else writes: what earlier kills have left of it is removed.
    """
    for left in target.parent.glob(f".{target.name}.*-*"):
        shutil.rmtree(left)
    fresh = target.with_name(f".{target.name}.new-{secrets.token_hex(4)}")
    write_folder(fresh, fill)
    if target.exists():
        old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
        os.rename(target, old)
        os.rename(fresh, target)
        shutil.rmtree(old)
    else:
        os.rename(fresh, target)
    fsync_folder(target.parent)


def refuse_existing(target: Path) -> None:
    """Raises a `UserError` if there is anything under this name."""
    if target.exists() or target.is_symlink():
        raise UserError(
            "there is something already, and it is not overwritten",
            where=target,
            fix="choose another --out, or move it away first",
        )


def _fsync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
