"""Bytes as they come: a file that may still grow, a named pipe, or standard input."""

import os
import select
import stat
import time
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from ftjax.errors import UserError

STDIN = "-"
STDIN_HANDLE = 0
SUFFIXES = (".jsonl", ".ndjson")
PIECE = 1 << 16  # bytes that are read at once
POLL = 0.1  # seconds that a read waits, so that whoever waits can be told to stop


class Feed(Protocol):
    """`read` gives bytes, b"" where none came for a moment, None when it is over."""

    def read(self) -> bytes | None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class _Opened:
    """Closes the descriptor `handle`, unless it is standard input."""

    handle: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.handle != STDIN_HANDLE:
            os.close(self.handle)


class GrowingFile(_Opened):
    """A file from byte `start` on; it is over when nothing came for `wait` seconds.

    The wait begins where a read finds nothing, not where the last one found something:
    a step may take longer than the writer does.
    """

    def __init__(self, path: Path, start: int, wait: float):
        self.handle = os.open(path, os.O_RDONLY)
        os.lseek(self.handle, start, os.SEEK_SET)
        self._wait, self._since = wait, -1.0

    def read(self) -> bytes | None:
        data = os.read(self.handle, PIECE)
        now = time.monotonic()
        if data:
            self._since = -1.0
            return data
        if self._since < 0:
            self._since = now
        elif now - self._since >= self._wait:
            return None
        time.sleep(min(POLL, self._wait))
        return b""


class Pipe(_Opened):
    """A named pipe or standard input; over when its last writer has closed it."""

    def __init__(self, source: str):
        self.handle = STDIN_HANDLE
        if source != STDIN:
            # Without O_NONBLOCK this would wait for a writer, deaf to signals.
            path = Path(source).expanduser()
            self.handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self.handle, select.POLLIN)

    def read(self) -> bytes | None:
        for _, event in self._poll.poll(POLL * 1000):
            if event & select.POLLNVAL:
                raise UserError("standard input is closed", where="config.data.train")
            # A hang-up alone says that all is read; end of file that nothing is left.
            return os.read(self.handle, PIECE) or None
        return b""


def is_file(source: str) -> bool:
    """Whether a stream's source is a file, which can be read again.

    Raises:
      UserError: the source is not there, or of a kind that is not read as a stream.
    """
    if source == STDIN:
        return False
    path = Path(source).expanduser()
    expected = f"a {' or '.join(SUFFIXES)} file, a named pipe, or - (standard input)"
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(
            "the stream cannot be read",
            where=f"config.data.train, {path}",
            expected=expected,
            got=error.strerror or str(error),
        ) from error
    if stat.S_ISFIFO(mode):
        return False
    if stat.S_ISREG(mode) and path.suffix.lower() in SUFFIXES:
        return True
    raise UserError(
        "this cannot be read as a stream",
        where=f"config.data.train, {path}",
        expected=expected,
        got="a file of another kind" if stat.S_ISREG(mode) else "no file and no pipe",
        fix="--config.data.stream=False reads a file as a whole, in many formats",
    )
