"""JSON lines, JSON lists and plain text, read with errors that name line and column."""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ftjax.data.words import clip, type_name
from ftjax.errors import UserError

MAX_LINE_BYTES = 64 << 20  # a longer line is refused, so that memory stays bounded
MAX_FILE_BYTES = 1 << 30  # of a .json list or .txt file, which are read whole
DOCUMENT_END = "<|endoftext|>"

_MAGIC = (
    (b"\x1f\x8b", "gzip data", "name it .jsonl.gz"),
    (b"PAR1", "a Parquet file", "name it .parquet"),
    (b"PK\x03\x04", "a zip archive", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "unpack it first, or use gzip"),
    (b"\x80\x02", "a pickle, which can run code", "write the rows as JSON lines"),
    (b"\x80\x04", "a pickle, which can run code", "write the rows as JSON lines"),
    (b"\x80\x05", "a pickle, which can run code", "write the rows as JSON lines"),
    (b"\xff\xfe", "UTF-16 text (byte order mark at byte 0)", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text (byte order mark at byte 0)", "save it as UTF-8"),
    (b"version https://git-lfs", "a git-LFS pointer, not the data", "git lfs pull"),
    (b"<!DOCTYPE", "a web page, not the data", "download the file itself"),
    (b"<html", "a web page, not the data", "download the file itself"),
)

Found = Iterator[tuple[dict[str, Any], str]]


@dataclass
class Faults:
    """What to do with a bad row: stop, or note it and go on."""

    skip: bool
    skipped: list[tuple[str, str]]

    def add(self, error: UserError) -> None:
        """Raises the error, or notes it where bad rows are skipped."""
        if not self.skip:
            raise error
        reason = error.what + (f" ({error.got})" if error.got else "")
        self.skipped.append((str(error.where), reason))


def json_lines(path: Path, faults: Faults, duplicates: list[tuple[str, str]]) -> Found:
    """Yields the object of each line; blank lines and a UTF-8 mark are passed over."""
    return objects(_lines(path), path, faults, duplicates)


def objects(
    lines: Iterable[tuple[int, bytes, bool]],
    path: Path,
    faults: Faults,
    duplicates: list[tuple[str, str]],
) -> Found:
    """As `json_lines`, of lines from anywhere: (number, bytes, whether it is whole)."""
    offset = 0
    for number, line, whole in lines:
        where = f"{path.name}:{number}"
        start, offset = offset, offset + len(line)
        if not whole:
            faults.add(_too_long(where))
            continue
        if number == 1:
            _refuse_magic(line, path)
            if line.startswith(b"\xef\xbb\xbf"):
                line, start = line[3:], 3
        if line.isspace() or not line:
            continue
        try:
            text = _decode(line, where, start)
            yield _object(text, where, line.endswith(b"\n"), duplicates), where
        except UserError as error:
            faults.add(error)


def json_list(path: Path, faults: Faults, duplicates: list[tuple[str, str]]) -> Found:
    """Yields the objects of a JSON list; a .json that holds lines is read as lines."""
    with path.open("rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"{"):
        yield from json_lines(path, faults, duplicates)
        return
    text = _whole(path)
    keys: list[str] = []
    try:
        rows = json.loads(text, object_pairs_hook=lambda pairs: _pairs(pairs, keys))
    except (ValueError, RecursionError) as error:
        raise _bad_json(error, path.name, text, cut=True) from None
    duplicates.extend((path.name, key) for key in keys)
    if not isinstance(rows, list):
        raise UserError(
            "a .json file must hold one list of objects",
            where=path,
            got=type_name(rows),
            fix="write a list, or one object a line as .jsonl",
        )
    for number, row in enumerate(rows, 1):
        where = f"{path.name}:row {number}"
        try:
            yield _checked(row, where, "\\u" in text), where
        except UserError as error:
            faults.add(error)


def text_documents(path: Path, separator: str) -> Found:
    """Yields {'text': ...} per document, without newlines at its ends.

    Args:
      path: of the text.
      separator: what stands between documents: a line that holds this alone, or, if it
        holds newlines, these characters wherever they are ('\\n\\n' is a blank line; a
        backslash and an n are a newline, for command lines). A file without it is one
        document. Empty: lines `<|endoftext|>`, or every line where there are none.
    """
    text = _whole(path).replace("\r\n", "\n")
    separator = separator.replace("\\n", "\n")
    if not separator:
        separator = DOCUMENT_END if DOCUMENT_END in text.split("\n") else "\n"
    if "\n" not in separator:
        # Framed by newlines, every line is; two lines in a row share one.
        line = rf"(?<=\n){re.escape(separator)}(?=\n)"
        text, pattern, number = f"\n{text}\n", line, 0
    else:
        pattern, number = re.escape(separator), 1
    start = 0
    for end, after in [
        *(m.span() for m in re.finditer(pattern, text)),
        (len(text),) * 2,
    ]:
        document = text[start:end]
        if document.strip():
            blank = len(document) - len(document.lstrip("\n"))
            yield {"text": document.strip("\n")}, f"{path.name}:{number + blank}"
        number += text.count("\n", start, after)
        start = after


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """(number, bytes, whether it is whole) of each line, MAX_LINE_BYTES at most."""
    number = 0
    try:
        with _binary(path) as file:
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                whole = line.endswith(b"\n") or len(line) < MAX_LINE_BYTES
                yield number, line, whole
                while not whole and (rest := file.readline(MAX_LINE_BYTES)):
                    whole = rest.endswith(b"\n") or len(rest) < MAX_LINE_BYTES
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            "the gzip file is damaged",
            where=f"{path} after line {number}",
            got=clip(error, 120),
            fix="copy or download it again",
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _binary(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.suffix.lower() != ".gz":
        return path.open("rb")
    with path.open("rb") as file:
        if file.read(2) not in (b"\x1f\x8b", b""):
            raise UserError(
                "this .gz file is not gzip data",
                where=path,
                fix="rename it if it is plain JSON lines, else download it again",
            )
    return gzip.open(path, "rb")


def _whole(path: Path) -> str:
    """The text of a file that must be read at once."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(
                "this file is too large to be read at once",
                where=path,
                expected=f"at most {MAX_FILE_BYTES >> 20} MiB",
                fix="write it as .jsonl or .parquet: those are read row by row",
            )
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    _refuse_magic(data, path)
    start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    return _decode(data[start:], path.name, start)


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        "the data file cannot be read", where=path, got=error.strerror or str(error)
    )


def _refuse_magic(head: bytes, path: Path) -> None:
    for magic, kind, fix in _MAGIC:
        if head.startswith(magic):
            raise UserError(f"the file is {kind}", where=path, fix=fix)


def _decode(line: bytes, where: str, offset: int) -> str:
    """UTF-8 text, or an error with the offset of the byte in the file."""
    null = line.find(b"\0")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            "this is not UTF-8 text",
            where=f"{where}, byte {offset + error.start:,} of the file",
            expected="UTF-8",
            got=f"byte 0x{line[error.start]:02x}",
            fix="convert the file, e.g. iconv -f latin1 -t utf-8",
        ) from None
    if null >= 0:
        raise UserError(
            "this text holds a NUL byte",
            where=f"{where}, byte {offset + null:,} of the file",
            fix="was it saved as UTF-16, or damaged? Save it as UTF-8",
        )
    return text


def _object(
    text: str, where: str, complete: bool, duplicates: list[tuple[str, str]]
) -> dict[str, Any]:
    keys: list[str] = []
    try:
        row = json.loads(text, object_pairs_hook=lambda pairs: _pairs(pairs, keys))
    except (ValueError, RecursionError) as error:
        raise _bad_json(error, where, text, cut=not complete) from None
    duplicates.extend((where, key) for key in keys)
    return _checked(row, where, "\\u" in text)


def _pairs(pairs: list[tuple[str, Any]], duplicates: list[str]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [key for key, _ in pairs]
        duplicates.extend({key for key in names if names.count(key) > 1})
    return row


def _checked(row: Any, where: str, escapes: bool) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(
            "a row is not an object",
            where=where,
            expected='an object such as {"prompt": "...", "completion": "..."}',
            got=f"{type_name(row)}: {clip(row)}",
        )
    if escapes:
        for key, value in row.items():
            _refuse_surrogate(key, value, where)
    return row


def _refuse_surrogate(key: str, value: Any, where: str) -> None:
    try:
        json.dumps([key, value], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        lone = error.object[error.start]
        raise UserError(
            "this text holds half of a character (a lone surrogate)",
            where=f"{where}, column `{clip(key)}`",
            expected="text that UTF-8 can write",
            got=f"\\u{ord(lone):04x}",
            fix="the row was cut in the middle of an emoji; write it again whole",
        ) from None


def _bad_json(error: Exception, where: str, text: str, cut: bool) -> UserError:
    """The error for unreadable JSON; `cut`: the text ends without a newline."""
    if not isinstance(error, json.JSONDecodeError):
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return UserError("this JSON is out of bounds", where=where, got=clip(what, 120))
    column = error.colno
    line = f"{where}, line {error.lineno}" if ":" not in where else where
    # A text that was cut off fails at its end, or in the string that never closes.
    ended = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
    looks = "; the file looks truncated" if cut and ended else ""
    around = text[max(0, error.pos - 20) : error.pos + 20].strip()
    return UserError(
        f"malformed JSON{looks}",
        where=f"{line}, column {column}",
        got=f"{error.msg} near {clip(around)!r}",
        fix="copy the file again"
        if looks
        else "mend the line, or data.on_bad_row=skip",
    )


def _too_long(where: str) -> UserError:
    return UserError(
        "this line is too long",
        where=where,
        expected=f"at most {MAX_LINE_BYTES >> 20} MiB in one line",
        fix="split the document into rows",
    )
