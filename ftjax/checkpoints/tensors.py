"""The safetensors format, read and written by hand.

A file is 8 bytes of header length (little endian), a JSON header
`{name: {dtype, shape, data_offsets}}`, and the tensors end to end. The header is
checked in full against the file's size before a single weight is read; then tensors
are memory-mapped, so that reading one costs no more memory than itself. By hand,
because errors must name their cause, and because bfloat16 must work without torch.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ftjax.checkpoints.jsonfile import parse_object, what_it_is
from ftjax.errors import UserError, require_regular

# Bits per element of every dtype of the format, to check sizes.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

FLOATS: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
INTS: dict[str, np.dtype[Any]] = {"U8": np.dtype(np.uint8), "I8": np.dtype(np.int8)}
_NAMES = {dtype: name for name, dtype in (FLOATS | INTS).items()}

_HEADER_LIMIT = 64 * 2**20
_AGAIN = "download the file again"


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: `dtype` as the format names it, offset in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8

    def read(self) -> np.ndarray:
        """The tensor, memory-mapped and read-only; its dtype: of FLOATS or INTS."""
        return self.raw().view((FLOATS | INTS)[self.dtype]).reshape(self.shape)

    def raw(self) -> np.ndarray:
        """Its bytes, memory-mapped and read-only."""
        if not self.nbytes:
            return np.zeros(0, np.uint8)
        return np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,))


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, after checking that the file holds all of them.

    Raises:
      UserError: naming the file, what was expected and what was found.
    """
    require_regular(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
            length = _header_length(path, head, size)
            file.seek(8)
            data = file.read(length)
    except OSError as error:
        raise UserError(
            "a weight file cannot be read", where=path, got=error.strerror or str(error)
        ) from error
    header = parse_object(data, f"{path} (header)")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _tensor(path, name, v, start) for name, v in header.items()}
    _check_layout(path, tensors, start, size)
    return tensors


def _header_length(path: Path, head: bytes, size: int) -> int:
    if not head:
        raise UserError("a weight file is empty", where=path, got="0 bytes", fix=_AGAIN)
    cause = what_it_is(head)
    if cause:
        raise UserError(
            "a weight file is not a safetensors file",
            where=path,
            expected="a safetensors file",
            got=f"{cause} ({size:,} bytes)",
            fix=_AGAIN,
        )
    length = int.from_bytes(head[:8], "little")
    if len(head) < 10 or not head[8:].lstrip().startswith(b"{"):
        raise UserError(
            "a weight file is not a safetensors file, or is damaged",
            where=path,
            expected="8 bytes of header length, then a JSON header",
            got=f"{size:,} bytes that begin with {head[:16]!r}",
            fix=_AGAIN,
        )
    if length > _HEADER_LIMIT:
        raise UserError(
            "a weight file claims an absurd header",
            where=path,
            expected=f"a header of at most {_HEADER_LIMIT:,} bytes",
            got=f"{length:,} bytes",
            fix=_AGAIN,
        )
    if 8 + length > size:
        raise UserError(
            "a weight file is cut off inside its header",
            where=path,
            expected=f"more than {8 + length:,} bytes",
            got=f"{size:,} bytes",
            fix=_AGAIN,
        )
    return length


def _tensor(path: Path, name: str, entry: Any, start: int) -> Tensor:
    def bad(expected: str, got: Any) -> UserError:
        return UserError(
            "the header of a weight file is damaged",
            where=f"{path}: {name[:200]!r}",
            expected=expected,
            got=repr(got)[:200],
            fix=_AGAIN,
        )

    if not isinstance(entry, dict):
        raise bad("{dtype, shape, data_offsets}", entry)
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise bad("a dtype of the safetensors format", dtype)
    if not _whole_numbers(shape) or len(shape) > 8:
        raise bad("a shape of at most 8 whole numbers", shape)
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad("data_offsets [begin, end]", offsets)
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise bad(f"{bits // 8:,} bytes for {dtype} {shape}", offsets)
    return Tensor(path, dtype, tuple(shape), start + offsets[0])


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**62
        for v in values
    )


def _check_layout(
    path: Path, tensors: dict[str, Tensor], start: int, size: int
) -> None:
    """Tensors must lie end to end and fill the file: no overlap, no gap, no rest."""
    end, last = start, "the header"
    in_order = sorted(tensors.items(), key=lambda kv: (kv[1].offset, kv[1].nbytes))
    for name, tensor in in_order:
        if tensor.offset != end:
            problem = "overlap" if tensor.offset < end else "leave a gap"
            raise UserError(
                f"tensors of a weight file {problem}",
                where=f"{path}: {name[:200]!r}",
                expected=f"to begin at byte {end:,}, after {last[:200]}",
                got=f"byte {tensor.offset:,}",
                fix=_AGAIN,
            )
        end, last = tensor.offset + tensor.nbytes, name
    if size != end:
        what = "is cut off" if size < end else "has bytes behind its last tensor"
        raise UserError(
            f"a weight file {what}",
            where=path,
            expected=f"{end:,} bytes",
            got=f"{size:,} bytes",
            fix=_AGAIN,
        )


@dataclass(frozen=True)
class Entry:
    """A tensor to be written; `values` is called when its turn has come.

    `dtype` is the file's where it is None.
    """

    name: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]
    dtype: np.dtype[Any] | None = None

    def nbytes(self, usual: np.dtype[Any]) -> int:
        return math.prod(self.shape) * (self.dtype or usual).itemsize


def write_tensors(
    path: Path,
    entries: Iterable[Entry],
    dtype: np.dtype[Any],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a safetensors file, one tensor in memory at a time, and syncs it.

    Never over an existing file: it could be the one that the weights are mapped from.
    Wider dtypes lie first, so that every tensor is aligned, as other readers want it;
    the entries are asked for their values in the order in which they come.

    Args:
      dtype: of FLOATS or INTS, of the entries that name none; `values()` is cast.
      metadata: the header's `__metadata__`; transformers wants {'format': 'pt'}.
    """
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for entry in sorted(entries, key=lambda e: -(e.dtype or dtype).itemsize):
        begin, end = end, end + entry.nbytes(dtype)
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype or dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            own = entry.dtype or dtype
            values = np.asarray(entry.values()).astype(own)
            if values.shape != entry.shape:
                raise ValueError(f"{entry.name}: {values.shape} is not {entry.shape}")
            file.seek(8 + len(text) + header[entry.name]["data_offsets"][0])
            flat = np.ascontiguousarray(values).reshape(-1)
            file.write(flat.view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
