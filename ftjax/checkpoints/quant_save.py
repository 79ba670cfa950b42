"""A model out in few bits: bitsandbytes' layouts where they fit, else ftjax's own.

The layouts are those of `packed.py`. bitsandbytes has one kind of weight in a model:
nf4 or fp4 throughout, or int8 with a scale for each output; such a plan is written so
that transformers loads it. Any other is listed in config.json projection by projection.

One weight is in memory as floats at a time, from its reading to its last tensor.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ftjax.checkpoints.hf_save import DTYPES, write_config, write_shards
from ftjax.checkpoints.packed import STATE
from ftjax.checkpoints.quantized import describe_formats
from ftjax.checkpoints.sums import write_sums
from ftjax.checkpoints.tensors import Entry
from ftjax.models.names import Path as LeafPath
from ftjax.models.names import Weight, model_weights
from ftjax.models.spec import ModelSpec
from ftjax.quant.codebooks import DYNAMIC, table
from ftjax.quant.encode import Encoded, encode
from ftjax.quant.formats import NESTED_BLOCK, Format

Plan = Mapping[LeafPath, Format]
Read = Callable[[LeafPath, Weight, int], np.ndarray]
Tell = Callable[[LeafPath, int, np.ndarray, Encoded], None]
Codes = Callable[[LeafPath, int], Encoded]
PER_CHANNEL = Format("int8", 0)
_F32, _U8, _I8 = np.dtype(np.float32), np.dtype(np.uint8), np.dtype(np.int8)
_LONGEST = -1.2345678901234567e-300  # as many characters as a float may take


def save_quantized(
    folder: Path,
    read: Read,
    spec: ModelSpec,
    plan: Plan,
    *,
    config: dict[str, Any],
    dtype: str,
    tell: Tell | None = None,
    codes: Codes | None = None,
) -> None:
    """Writes `config.json`, safetensors and their hashes; codes are `encode`'s.

    Args:
      folder: exists; the caller renames it into place when all is written.
      read: (path, weight, layer) -> the values as published, [outputs, inputs]
        float32 for a projection; called once for each, in the order of the files.
      plan: the format of each projection that is quantized.
      config: the configuration of the model that is quantized.
      dtype: of what stays floating point.
      tell: (path, layer, weight, its codes), called for each as it is quantized.
      codes: (path, layer) -> what a projection is quantized to already; it is not read.
    """
    source = Source(read, tell, codes)
    entries = _entries(source, spec, plan, dtype)
    write_shards(folder, entries, DTYPES[dtype])
    write_sums(folder)
    write_config(folder, config, spec, dtype, quantization_config(plan, spec, dtype))


def quantization_config(plan: Plan, spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """What config.json says of a plan; `bitsandbytes` where its library can read it."""
    kinds = set(plan.values())
    tables = all(fmt.is_table for fmt in kinds)
    one = len({(fmt.name, fmt.double) for fmt in kinds}) == 1
    if not one or not (tables or kinds == {PER_CHANNEL}):
        return {"quant_method": "ftjax", "formats": describe_formats(plan)}
    fmt = next(iter(kinds))
    left = [path[:-1] for path in model_weights(spec) if path[-1] == "w"]
    skipped = [_suffix(path) for path in left if path not in plan]
    if spec.tied:
        skipped.append("lm_head")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": tables,
        "load_in_8bit": not tables,
        "bnb_4bit_quant_type": fmt.name if tables else "fp4",
        "bnb_4bit_use_double_quant": fmt.double,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
    }


def _suffix(path: LeafPath) -> str:
    return ".".join(path[1:] if path[0] == "layers" else path)


class Source(NamedTuple):
    """Where values and codes come from, as `save_quantized` says."""

    read: Read
    tell: Tell | None
    codes: Codes | None


def _entries(
    source: Source, spec: ModelSpec, plan: Plan, dtype: str
) -> Iterator[Entry]:
    for path, weight in model_weights(spec).items():
        fmt = plan.get(path[:-1]) if path[-1] == "w" else None
        for i, name in enumerate(weight.names):
            if fmt is None:
                values = _reader(source.read, path, weight, i)
                yield Entry(name, weight.stored_shape, values)
            else:
                yield from _Quantized(source, path, weight, i, fmt, dtype).entries()


def _reader(
    read: Read, path: LeafPath, weight: Weight, i: int
) -> Callable[[], np.ndarray]:
    return lambda: read(path, weight, i)


class _Quantized:
    """The tensors of one weight, quantized when the first of them is wanted."""

    def __init__(
        self,
        source: Source,
        path: LeafPath,
        weight: Weight,
        layer: int,
        fmt: Format,
        dtype: str,
    ):
        self.source, self.path, self.weight, self.layer = source, path, weight, layer
        self.fmt, self.dtype = fmt, dtype
        self.name, self.shape = weight.names[layer], weight.stored_shape
        self.encoded: Encoded | None = None

    def entries(self) -> list[Entry]:
        """In the order of the file."""
        if self.fmt.is_table:
            found = self._table()
        elif self.fmt == PER_CHANNEL:
            found = self._channel()
        else:
            found = self._grouped()
        last = found[-1]
        found[-1] = Entry(last.name, last.shape, self._closing(last), last.dtype)
        return found

    def _encode(self) -> Encoded:
        source = self.source
        if self.encoded is None and source.codes is not None:
            self.encoded = source.codes(self.path, self.layer)
        elif self.encoded is None:
            values = source.read(self.path, self.weight, self.layer)
            self.encoded = encode(values, self.fmt)
            if source.tell is not None:
                source.tell(self.path, self.layer, values, self.encoded)
        return self.encoded

    def _closing(self, entry: Entry) -> Callable[[], np.ndarray]:
        """The values of the last tensor; then the codes are let go."""

        def values() -> np.ndarray:
            found = entry.values()
            self.encoded = None
            return found

        return values

    def _part(
        self, field: str, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> Entry:
        def values() -> np.ndarray:
            return np.asarray(getattr(self._encode(), field)).reshape(shape)

        return Entry(name, shape, values, dtype)

    def _table(self) -> list[Entry]:
        fmt, count = self.fmt, math.prod(self.shape)
        blocks, half = -(-count // fmt.group), -(-count // 2)
        found = [
            Entry(
                self.name,
                (half, 1),
                lambda: pairs(self._encode().codes.reshape(1, -1)).T,
                _U8,
            ),
            self._part(
                "scale", f"{self.name}.absmax", (blocks,), _U8 if fmt.double else _F32
            ),
            _constant(f"{self.name}.quant_map", table(fmt.name)),
        ]
        if fmt.double:
            nested = (-(-blocks // NESTED_BLOCK),)
            name = f"{self.name}.nested_absmax"
            found.append(self._part("nested", name, nested, _F32))
            found.append(_constant(f"{self.name}.nested_quant_map", DYNAMIC))
        # The header comes first, and the mean of the scales is not known yet: spaces
        # make the text as long as the longest number would.
        size = len(self._state(_LONGEST))

        def state() -> np.ndarray:
            offset = self._encode().offset
            text = self._state(0.0 if offset is None else float(offset))
            return np.frombuffer(text.ljust(size), np.uint8)

        found.append(Entry(f"{self.name}.{STATE}{fmt.name}", (size,), state, _U8))
        return found

    def _state(self, offset: float) -> bytes:
        facts: dict[str, Any] = {
            "quant_type": self.fmt.name,
            "blocksize": self.fmt.group,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        if self.fmt.double:
            facts["nested_blocksize"] = NESTED_BLOCK
            facts["nested_dtype"] = "float32"
            facts["nested_offset"] = offset
        return json.dumps(facts).encode()

    def _channel(self) -> list[Entry]:
        module = self.name.removesuffix(".weight")
        return [
            self._part("codes", self.name, self.shape, _I8),
            self._part("scale", f"{module}.SCB", self.shape[:1], _F32),
            _constant(f"{module}.weight_format", np.zeros((), np.uint8)),
        ]

    def _grouped(self) -> list[Entry]:
        fmt, (outputs, inputs) = self.fmt, self.shape
        if fmt.bits == 4:
            half = (outputs, -(-inputs // 2))
            codes = Entry(self.name, half, lambda: pairs(self._encode().codes), _U8)
        else:
            codes = self._part(
                "codes", self.name, self.shape, _U8 if fmt.affine else _I8
            )
        groups = (outputs, inputs // fmt.group if fmt.group else 1)
        found = [codes, self._part("scale", f"{self.name}.scale", groups, _F32)]
        if fmt.affine:
            found.append(self._part("zero", f"{self.name}.zero", groups, _U8))
        return found


def _constant(name: str, values: np.ndarray) -> Entry:
    return Entry(name, values.shape, lambda: values, values.dtype)


def pairs(codes: np.ndarray) -> np.ndarray:
    """Neighbours along the last axis share a byte, the first in the high half."""
    rows, count = codes.shape
    packed = np.zeros((rows, -(-count // 2)), np.uint8)
    packed |= codes[:, 0::2] << 4
    packed[:, : count // 2] |= codes[:, 1::2]
    return packed
