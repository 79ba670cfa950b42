"""One run at a time in a directory: a lock file that names its holder.

The file is made with O_EXCL, which holds on every file system and between hosts. The
lock of a dead process of this host is taken over; of another host's process nothing is
known, so the user has to decide.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from ftjax.errors import EXIT_BUSY, UserError


@dataclass(frozen=True)
class Holder:
    """The process that holds a run directory.

    `ticks` (its start, in clock ticks since boot) and `boot` tell it from a later
    process with the same pid; both are empty where there is no /proc.
    """

    pid: int
    host: str
    started: str
    ticks: str
    boot: str

    @classmethod
    def me(cls) -> Self:
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        pid = os.getpid()
        return cls(pid, socket.gethostname(), started, _start_ticks(pid), _boot_id())

    def alive(self) -> bool:
        """Whether it still runs; only for a holder on this host."""
        if self.boot and _boot_id() and self.boot != _boot_id():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True  # somebody else's process
        if not self.ticks or not os.path.exists("/proc/self/stat"):
            return True
        return _start_ticks(self.pid) == self.ticks


def take_lock(lock: Path, *, report: Callable[[str], None] = print) -> Holder:
    """Makes the lock file, or takes over that of a dead process of this host.

    Raises:
      UserError: somebody holds it (exit 5); says who, since when, and what to do.
      OSError: the folder cannot be written to.
    """
    with _exclusive(lock.parent):
        return _take(lock, report)


def release_lock(lock: Path, holder: Holder) -> None:
    """Removes the lock file if `holder` still has it."""
    if _read_lock(lock) == holder:
        lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Lets one process at a time look at the lock file and replace a stale one.

    The kernel's lock ends with the process, but it does not reach other hosts on
    every file system; the lock file, made with O_EXCL, does.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # no such locks on this file system
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _take(lock: Path, report: Callable[[str], None]) -> Holder:
    me = Holder.me()
    if lock.exists():
        holder = _read_lock(lock)
        if holder is not None and (holder.host != me.host or holder.alive()):
            raise _busy(lock, holder, holder.host == me.host)
        whose = f"process {holder.pid}" if holder else "an unknown process"
        report(f"taking over the lock of {whose}, which no longer runs: {lock}")
        lock.unlink()
    try:
        with open(lock, "x", encoding="utf-8") as file:
            json.dump(asdict(me), file)
    except FileExistsError as error:
        raise UserError(
            "another process has just taken this run directory",
            where=lock,
            fix="wait for it, or use another --workdir",
            code=EXIT_BUSY,
        ) from error
    return me


def _busy(lock: Path, holder: Holder, here: bool) -> UserError:
    if here:
        fix = f"wait for it, stop it (kill {holder.pid}), or use another --workdir"
    else:
        fix = (
            f"look on {holder.host} whether it still runs; if it does not, delete "
            f"{lock} and start again"
        )
    return UserError(
        "another run holds this directory",
        where=lock,
        got=f"process {holder.pid} on host {holder.host}, started {holder.started}",
        fix=fix,
        code=EXIT_BUSY,
    )


def _read_lock(lock: Path) -> Holder | None:
    """The holder on record; None if there is none, or a record cut short by a kill."""
    try:
        return Holder(**json.loads(lock.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _start_ticks(pid: int) -> str:
    """When a process started, in clock ticks since boot; "" if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The name in parentheses may hold spaces; proc(5) counts state as field 3.
    fields = stat.rpartition(")")[2].split()
    dead = fields[0] in ("Z", "X")
    return "" if dead else fields[19]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
