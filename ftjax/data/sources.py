"""Where rows come from: one source name in, rows that know their place out.

A source is a file (JSON lines, plain or gzipped; a JSON list; Parquet; text), the data
that ships (`pydoc:instructions[train]`), or the name of a `datasets` data set
(`owner/name`, `owner/name:subset`, `owner/name[split]`). Nothing is ever unpickled.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftjax.data import files, tables
from ftjax.data.words import clip, nearest, quoted
from ftjax.errors import UserError, require_regular

PYDOC = "pydoc"
PYDOC_KINDS = ("instructions", "text", "preferences")
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".joblib")
_NAME = re.compile(r"(?P<name>[^\[\]]+?)(\[(?P<split>[^\[\]]+)\])?")
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
      values: its columns.
      where: its place: `file.jsonl:37`, `file.parquet:row 12` (the first row is row 1).
    """

    values: dict[str, Any]
    where: str


@dataclass
class RowReader:
    """Iterates over the rows of a source; afterwards says what it passed over.

    Attributes:
      skipped: (where, reason) of every bad row, with `on_bad_row="skip"`.
      duplicate_keys: (where, key) of keys that occur twice in one object; the last
        one counts, as in any JSON reader.
    """

    source: str
    on_bad_row: str
    split: str
    separator: str
    skipped: list[tuple[str, str]] = field(default_factory=list)
    duplicate_keys: list[tuple[str, str]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Row]:
        self.skipped.clear()
        self.duplicate_keys.clear()
        faults = files.Faults(self.on_bad_row == "skip", self.skipped)
        for values, where in _open(
            self.source, self.split, faults, self.duplicate_keys, self.separator
        ):
            yield Row(values, where)


def read_rows(
    source: str, *, on_bad_row: str = "error", split: str = "train", separator: str = ""
) -> RowReader:
    """Opens a source. Errors come while iterating, each with its file and line.

    Args:
      source: see the head of this module.
      on_bad_row: 'error' stops at the first row that cannot be read, 'skip' notes it.
      split: the split of a `datasets` name or of shipped data that names none.
      separator: of the documents of a text file; see `files.text_documents`.
    """
    return RowReader(str(source), on_bad_row, split, separator)


def _open(
    source: str,
    split: str,
    faults: files.Faults,
    duplicates: list[tuple[str, str]],
    separator: str,
) -> Iterator[tuple[dict[str, Any], str]]:
    if not source:
        raise UserError("no data is named", where="data.train", fix="name a file")
    if source.partition(":")[0] == PYDOC:
        return _pydoc(source, split)
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(
            "the data is a directory, not a file",
            where=path,
            expected="one .jsonl, .jsonl.gz, .json, .parquet or .txt file",
            got=_listing(path),
            fix="name one file in it",
        )
    require_regular(path)
    suffixes = "".join(path.suffixes[-2:]).lower()
    reader = _reader(suffixes, duplicates, separator)
    if path.exists():
        if path.suffix.lower() in PICKLES:
            raise UserError(
                f"`{path.suffix}` files can run code when read, so ftjax never does",
                where=path,
                fix="write the rows as JSON lines or Parquet",
            )
        if reader is None:
            raise UserError(
                "this kind of file is not read",
                where=path,
                expected=".jsonl, .jsonl.gz, .json (a list), .parquet or .txt",
                got=path.suffix or "no extension",
                fix="rename it if it is one of these, else convert it",
            )
        return reader(path, faults)
    if reader is not None or not _HUB.fullmatch(source.partition("[")[0]):
        raise _missing(path)
    match = _NAME.fullmatch(source)
    if match is None:
        raise _missing(path)
    return tables.hub(match["name"], match["split"] or split)


def _reader(suffixes: str, duplicates: list[tuple[str, str]], separator: str) -> Any:
    def json_lines(path: Path, faults: files.Faults) -> Iterator[Any]:
        return files.json_lines(path, faults, duplicates)

    def json_list(path: Path, faults: files.Faults) -> Iterator[Any]:
        return files.json_list(path, faults, duplicates)

    def text(path: Path, faults: files.Faults) -> Iterator[Any]:
        del faults
        return files.text_documents(path, separator)

    for ending, reader in (
        (".jsonl", json_lines),
        (".ndjson", json_lines),
        (".jsonl.gz", json_lines),
        (".json.gz", json_lines),
        (".json", json_list),
        (".parquet", tables.parquet),
        (".txt", text),
    ):
        if suffixes.endswith(ending):
            return reader
    return None


def _pydoc(source: str, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    match = _NAME.fullmatch(source.partition(":")[2])
    kind = match["name"] if match else ""
    split = (match["split"] if match else None) or split
    if kind not in PYDOC_KINDS or split not in ("train", "eval"):
        near = nearest(kind, PYDOC_KINDS)
        raise UserError(
            "the shipped data has no such part",
            where=source,
            expected="pydoc:KIND[SPLIT] with KIND one of "
            f"{quoted(PYDOC_KINDS)} and SPLIT `train` or `eval`",
            fix=f"did you mean pydoc:{near}[train]?" if near else None,
        )
    # Imported here: it reads the standard library's docstrings, which takes a while.
    from ftjax.data import pydocs

    name = f"pydoc:{kind}[{split}]"
    rows = enumerate(pydocs.rows(kind, split), 1)
    return ((values, f"{name}:row {number}") for number, values in rows)


def _missing(path: Path) -> UserError:
    siblings = path.parent.iterdir() if path.parent.is_dir() else []
    near = nearest(path.name, [p.name for p in siblings])
    return UserError(
        "there is no such data file",
        where=path,
        got=None if path.parent.is_dir() else f"no directory {clip(path.parent, 200)}",
        fix=f"did you mean {path.parent / near}?" if near else "check the path",
    )


def _listing(folder: Path) -> str:
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError as error:
        return clip(error, 120)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"a directory with {quoted(names[:5])}{more}" if names else "empty"
