"""The lines of a stream, kept in the run's folder as they are read.

What a run has read of a pipe cannot be read again. So every byte goes to
`stream.jsonl` first: a run that goes on reads that file from its beginning, and then
what the pipe, or the rest of the file, still has. `stream.end` says that a pipe was
closed: there is nothing to wait for.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ftjax.data.feed import PIECE, Feed, GrowingFile, Pipe, is_file
from ftjax.data.files import MAX_LINE_BYTES
from ftjax.errors import UserError
from ftjax.workdir import storage_error

_SOME = re.compile(rb"\S[^\n]*\n")  # a line that is not blank
NAME, END = "stream.jsonl", "stream.end"


class HaltedError(Exception):
    """The run was asked to stop while it waited for rows."""


class Place(NamedTuple):
    """A place between two lines: how many are before it, and how many bytes."""

    lines: int = 0
    bytes: int = 0


class Spool:
    """Lines of a stream, first those that are kept.

    Args:
      folder: of the run; nobody else writes to it.
      source: a file, a named pipe or '-'.
      wait: seconds without a byte after which a file is over.
      halted: whether to stop waiting.
      known: where the saved steps end, and the digest of what is before; of a file,
        what was read after that is read again.

    Raises:
      UserError: what is kept, or the file, is no longer what the saved steps read.
    """

    def __init__(
        self,
        folder: Path,
        source: str,
        wait: float,
        halted: Callable[[], bool],
        known: tuple[Place, str] | None = None,
    ):
        self.path, self._end = folder / NAME, folder / END
        self.source, self.wait, self.halted = source, wait, halted
        self.from_file = is_file(source)
        # What errors name: a line of a pipe can be looked up in what is kept of it.
        self.shown = Path(source).expanduser() if self.from_file else self.path
        self.taken = Place()  # the lines that were handed out
        self.more = False  # whether another one is in memory
        self._hash, self._hashed = hashlib.blake2b(digest_size=16), 0
        place, digest = known or (Place(), self._hash.hexdigest())
        if self.digest(place) != digest:
            raise UserError(
                "the rows that this run has read are no longer there",
                where=self.path,
                expected=f"the first {place.bytes:,} bytes as they were",
                fix="restore the file from a copy, or start anew in another --workdir",
            )
        if self.from_file:
            self._cut(place)

    def digest(self, place: Place) -> str:
        """Of all bytes before a place that is not before the last one asked for."""
        self.path.touch()
        with self.path.open("rb") as file:
            file.seek(self._hashed)
            while self._hashed < place.bytes:
                data = file.read(min(PIECE, place.bytes - self._hashed))
                if not data:
                    break
                self._hash.update(data)
                self._hashed += len(data)
        return self._hash.hexdigest()

    def sync(self) -> None:
        """Makes what is kept outlive the machine."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def lines(self) -> Iterator[tuple[int, bytes, bool]]:
        """(number, bytes, whether it is whole) of each line; see `files`.

        Raises:
          HaltedError: `halted()` while waiting.
          UserError: the disk is full, or the file has been changed.
        """
        buffer, whole, size = bytearray(), True, 0
        number, before = 1, 0
        for data in self._pieces():
            begin = len(buffer)
            buffer += data
            while (end := buffer.find(b"\n", begin)) >= 0:
                line = bytes(buffer[: end + 1])
                del buffer[: end + 1]
                begin, size = 0, size + len(line)
                self.more = _SOME.search(buffer) is not None
                before += size
                self.taken = Place(number, before)
                yield number, line, whole
                number, whole, size = number + 1, True, 0
            if len(buffer) > MAX_LINE_BYTES:
                whole, size = False, size + len(buffer)
                buffer.clear()
        if buffer or not whole:
            self.taken = Place(number, before + size + len(buffer))
            yield number, bytes(buffer), whole

    def _pieces(self) -> Iterator[bytes]:
        size = self.path.stat().st_size
        if self._end.exists():
            yield from self._kept(size)
            return
        # Opened first: a pipe without a reader forgets what was written to it.
        with self._feed(size) as feed, self.path.open("ab", buffering=0) as kept:
            yield from self._kept(size)
            while (fresh := self._next(feed)) is not None:
                if fresh:
                    self._keep(kept.write, fresh)
                    yield fresh
        try:
            self._end.write_text(json.dumps({"source": self.source}) + "\n", "utf-8")
        except OSError as error:
            raise storage_error(error, self._end) or error from error

    def _kept(self, size: int) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while size and (data := file.read(min(PIECE, size))):
                size -= len(data)
                yield data

    def _feed(self, size: int) -> Feed:
        try:
            if not self.from_file:
                return Pipe(self.source)
            return GrowingFile(self.shown, size, self.wait)
        except OSError as error:
            raise self._unreadable(error) from error

    def _next(self, feed: Feed) -> bytes | None:
        if self.halted():
            raise HaltedError
        try:
            return feed.read()
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(
            "the stream cannot be read on",
            where=self.source,
            got=error.strerror or str(error),
        )

    def _keep(self, write: Callable[[bytes], int], data: bytes) -> None:
        try:
            while data:
                data = data[write(data) :]
        except OSError as error:
            raise storage_error(error, self.path) or error from error

    def _cut(self, place: Place) -> None:
        """Forgets what a file no longer says after a place; that is kept aside.

        A line that stopped a run may have been mended. What is before the place has
        been trained on, and stays.
        """
        same = _common(self.shown, self.path)
        if same < place.bytes:
            raise UserError(
                "the file is not the one that this run has read so far",
                where=self.shown,
                expected=f"the first {place.bytes:,} bytes as in {self.path}",
                got=f"another byte {same:,}",
                fix="restore it, or start anew in another --workdir",
            )
        if same < self.path.stat().st_size:
            aside = self.path.with_name(
                f"{self.path.stem}.{secrets.token_hex(4)}.jsonl"
            )
            shutil.copyfile(self.path, aside)
            os.truncate(self.path, place.bytes)
        self._end.unlink(missing_ok=True)


def _common(one: Path, two: Path) -> int:
    """How many bytes two files have in common, from their beginnings on."""
    same = 0
    with one.open("rb") as a, two.open("rb") as b:
        while True:
            x, y = a.read(PIECE), b.read(PIECE)
            if x != y or not x:
                near = zip(x, y, strict=False)
                first = next((i for i, (p, q) in enumerate(near) if p != q), None)
                return same + (min(len(x), len(y)) if first is None else first)
            same += len(x)
