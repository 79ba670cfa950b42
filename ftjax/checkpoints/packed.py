"""Weights that are stored quantized: checked against their shapes, read as codes.

Three layouts, told apart by the tensors beside `X.weight`:

    bitsandbytes, 4 bits   `X.weight` uint8 [n/2, 1]: two codes a byte over the flat
                           weight, the first of a pair in the high half;
                           `X.weight.absmax`, `.quant_map`, and JSON as bytes:
                           `.quant_state.bitsandbytes__nf4`; under double quantization
                           `.nested_absmax` and `.nested_quant_map` too
    bitsandbytes, 8 bits   `X.weight` int8 [out, in], `X.SCB` float32 [out],
                           `X.weight_format`
    ftjax                  `X.weight` [out, in], 4 bits [out, in/2], first code high;
                           `X.weight.scale` float32 [out, groups], and of affine codes
                           `X.weight.zero` uint8 [out, groups]

Nothing is turned into floats here. Exact: the codes are those of the file.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftjax.checkpoints.jsonfile import parse_object
from ftjax.checkpoints.tensors import Tensor
from ftjax.errors import UserError
from ftjax.quant.codebooks import DYNAMIC, table
from ftjax.quant.encode import Encoded
from ftjax.quant.formats import BLOCKS, NESTED_BLOCK, TABLES, Format

STATE = "quant_state.bitsandbytes__"
PART = re.compile(
    r"(?P<weight>.*\.weight)\.(?P<part>absmax|quant_map|nested_absmax|nested_quant_map"
    r"|quant_state\.bitsandbytes__\w+|scale|zero)"
    r"|(?P<module>.*)\.(?P<own>SCB|weight_format)"
)
STATE_LIMIT = 4096  # bytes of JSON beside one weight
_CLOSE = 1e-6  # between a stored table and ours: printed digits, never another table
_AGAIN = "download the checkpoint again, or quantize the original anew"


@dataclass(frozen=True)
class Packed:
    """One weight [outputs, inputs] as it is stored.

    Attributes:
      name: of the weight.
      parts: its tensors by what they are: 'codes', 'scale', 'zero', 'nested'.
      offset: of the scales under double quantization.
    """

    name: str
    format: Format
    shape: tuple[int, int]
    parts: Mapping[str, Tensor]
    offset: float | None = None

    def read(self) -> Encoded:
        """The codes and scales, on the host.

        Raises:
          UserError: for a scale that is negative, NaN or infinite, or a zero point
            that is no code.
        """
        fmt, (outputs, inputs) = self.format, self.shape
        codes = self.parts["codes"].raw()
        if fmt.bits == 4 and fmt.is_table:
            codes = neighbours(codes)[: outputs * inputs].reshape(self.shape)
        elif fmt.bits == 4:
            codes = neighbours(codes.reshape(outputs, -1))[:, :inputs]
        else:
            codes = codes.view(np.uint8 if fmt.affine else np.int8).reshape(self.shape)
        scale = self.parts["scale"].read()
        zero = self.parts["zero"].read() if fmt.affine else None
        nested = self.parts["nested"].read() if fmt.double else None
        self._check_scales(nested if nested is not None else scale)
        if zero is not None and int(zero.max(initial=0)) >= 2**fmt.bits:
            raise self._bad("zero", f"zero points below {2**fmt.bits}", zero.max())
        offset = None if self.offset is None else np.float32(self.offset)
        if not fmt.is_table:
            scale = scale.reshape(outputs, -1)
        return Encoded(
            codes, scale, zero, nested, None if offset is None else np.asarray(offset)
        )

    def _check_scales(self, scale: np.ndarray) -> None:
        wrong = scale[~(np.isfinite(scale) & (scale >= 0))]
        if wrong.size:
            part = "nested" if self.format.double else "scale"
            raise self._bad(
                part, "finite scales", f"{wrong.size:,} such as {wrong.flat[0]}"
            )

    def _bad(self, part: str, expected: str, got: Any) -> UserError:
        return UserError(
            "a quantized weight is damaged",
            where=f"{self.parts[part].file}: {self.name} ({part})",
            expected=expected,
            got=str(got),
            fix=_AGAIN,
        )


def neighbours(packed: np.ndarray) -> np.ndarray:
    """Two codes out of every byte along the last axis, the high one first."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    np.right_shift(packed, 4, out=codes[..., 0::2])
    np.bitwise_and(packed, 15, out=codes[..., 1::2])
    return codes


def group_parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What lies beside the weights: {'X.weight': {'absmax': tensor, ...}}."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = PART.fullmatch(name)
        if match:
            part = match["part"] or match["own"]
            found.setdefault(weight_of(name), {})[part] = tensor
    return found


def weight_of(name: str) -> str:
    """The weight that a tensor lies beside; '' if that is not its kind of name."""
    match = PART.fullmatch(name)
    if match is None:
        return ""
    return match["weight"] or f"{match['module']}.weight"


def open_packed(
    name: str,
    shape: tuple[int, int],
    codes: Tensor,
    parts: Mapping[str, Tensor],
    declared: Format | None,
) -> Packed:
    """Checks everything that is stored of one weight; reads its small tables.

    Args:
      name: of the weight.
      shape: [outputs, inputs], as config.json implies.
      codes: the tensor of that name.
      parts: those beside it.
      declared: its format, where config.json has one (the 'ftjax' layouts).

    Raises:
      UserError: naming the tensor that is missing, left over or wrong.
    """
    state = [part for part in parts if part.startswith(STATE)]
    if state or "absmax" in parts:
        packed = _table(name, shape, codes, parts, state)
    elif "SCB" in parts:
        packed = _channel(name, shape, codes, parts)
    elif declared is not None:
        packed = _grouped(name, shape, codes, parts, declared)
    else:
        raise _wrong(codes, name, "the scales of a known layout", ", ".join(parts))
    if declared is not None and packed.format != declared:
        raise UserError(
            "a weight is quantized in another way than config.json says",
            where=f"{codes.file}: {name}",
            expected=str(declared),
            got=str(packed.format),
            fix=_AGAIN,
        )
    return packed


def _table(
    name: str,
    shape: tuple[int, int],
    codes: Tensor,
    parts: Mapping[str, Tensor],
    state: list[str],
) -> Packed:
    """nf4 and fp4 as bitsandbytes has them."""
    if len(state) != 1:
        raise _wrong(codes, name, f"one {STATE}nf4 or fp4", ", ".join(state) or "none")
    facts = _facts(name, parts[state[0]])
    kind = state[0].removeprefix(STATE)
    double = "nested_absmax" in parts
    fmt = _check_facts(name, parts[state[0]], facts, kind, shape, double)
    count = math.prod(shape)
    blocks = -(-count // fmt.group)
    nested = ("nested_absmax", "nested_quant_map") if double else ()
    _exactly(name, codes, parts, (state[0], "absmax", "quant_map", *nested))
    if codes.nbytes != -(-count // 2):
        got = f"{codes.nbytes:,} bytes"
        raise _wrong(codes, name, f"{-(-count // 2):,} bytes for {shape}", got)
    _shape(name, parts, "absmax", "U8" if double else "F32", (blocks,))
    _known_table(name, parts, "quant_map", table(kind))
    found = {"codes": codes, "scale": parts["absmax"]}
    if not double:
        return Packed(name, fmt, shape, found)
    _shape(name, parts, "nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),))
    _known_table(name, parts, "nested_quant_map", DYNAMIC)
    found["nested"] = parts["nested_absmax"]
    return Packed(name, fmt, shape, found, float(facts["nested_offset"]))


def _facts(name: str, tensor: Tensor) -> dict[str, Any]:
    if tensor.dtype != "U8" or tensor.nbytes > STATE_LIMIT:
        got = f"{tensor.dtype}, {tensor.nbytes:,} bytes"
        raise _wrong(tensor, name, f"JSON in at most {STATE_LIMIT} bytes", got)
    return parse_object(tensor.raw().tobytes(), f"{tensor.file}: {name} (quant_state)")


def _check_facts(
    name: str,
    tensor: Tensor,
    facts: dict[str, Any],
    kind: str,
    shape: tuple[int, int],
    double: bool,
) -> Format:
    """The format that the JSON beside a weight declares."""
    floats = ("float16", "bfloat16", "float32")
    rules: dict[str, tuple[Any, ...]] = {
        "quant_type": (kind,) if kind in TABLES else TABLES,
        "blocksize": BLOCKS,
        "shape": (list(shape),),
        "dtype": floats,
    }
    if double:
        rules |= {"nested_blocksize": (NESTED_BLOCK,), "nested_dtype": ("float32",)}
    for key, allowed in rules.items():
        value = facts.get(key)
        if isinstance(value, bool) or value not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise _wrong(tensor, f"{name} (quant_state: {key})", wanted, repr(value))
    offset: Any = facts.get("nested_offset") if double else 0.0
    number = isinstance(offset, int | float) and not isinstance(offset, bool)
    if not number or not abs(float(offset)) < float(np.finfo(np.float32).max):
        key = f"{name} (quant_state: nested_offset)"
        raise _wrong(tensor, key, "a float32 number", repr(offset)[:80])
    odd = sorted(facts.keys() - rules.keys() - {"nested_offset"})
    if odd:
        raise _wrong(tensor, f"{name} (quant_state)", "no other keys", ", ".join(odd))
    return Format(kind, facts["blocksize"], double=double)


def _known_table(
    name: str, parts: Mapping[str, Tensor], part: str, known: np.ndarray
) -> None:
    _shape(name, parts, part, "F32", known.shape)
    stored = parts[part].read()
    far = float(np.max(np.abs(stored - known))) if np.isfinite(stored).all() else np.nan
    if not far <= _CLOSE:
        raise _wrong(
            parts[part],
            f"{name}.{part}",
            "the table of bitsandbytes",
            f"values that differ from it by up to {far:.3g}",
        )


def _channel(
    name: str, shape: tuple[int, int], codes: Tensor, parts: Mapping[str, Tensor]
) -> Packed:
    """int8 with a scale for each output, as bitsandbytes has it."""
    own = ("SCB", "weight_format") if "weight_format" in parts else ("SCB",)
    _exactly(name, codes, parts, own)
    _shape(name, {"": codes}, "", "I8", shape)
    _shape(name, parts, "SCB", "F32", (shape[0],))
    if "weight_format" in parts:
        order = parts["weight_format"]
        if order.dtype != "U8" or order.nbytes != 1 or int(order.raw()[0]) != 0:
            got = f"{order.dtype}, bytes {order.raw()[:4].tolist()}"
            raise _wrong(order, f"{name} (weight_format)", "0, rows as they are", got)
    fmt = Format("int8", 0)
    return Packed(name, fmt, shape, {"codes": codes, "scale": parts["SCB"]})


def _grouped(
    name: str,
    shape: tuple[int, int],
    codes: Tensor,
    parts: Mapping[str, Tensor],
    fmt: Format,
) -> Packed:
    """Integers in ftjax's own layout."""
    outputs, inputs = shape
    if fmt.is_table or (fmt.group and inputs % fmt.group):
        raise _wrong(codes, name, f"the tensors of {fmt}", ", ".join(parts))
    groups = inputs // fmt.group if fmt.group else 1
    _exactly(name, codes, parts, ("scale", "zero") if fmt.affine else ("scale",))
    signed = fmt.bits == 8 and not fmt.affine
    wide = inputs if fmt.bits == 8 else -(-inputs // 2)
    _shape(name, {"": codes}, "", "I8" if signed else "U8", (outputs, wide))
    _shape(name, parts, "scale", "F32", (outputs, groups))
    found = {"codes": codes, "scale": parts["scale"]}
    if fmt.affine:
        _shape(name, parts, "zero", "U8", (outputs, groups))
        found["zero"] = parts["zero"]
    return Packed(name, fmt, shape, found)


def _exactly(
    name: str, codes: Tensor, parts: Mapping[str, Tensor], wanted: tuple[str, ...]
) -> None:
    missing = [part for part in wanted if part not in parts]
    extra = [part for part in parts if part not in wanted]
    if missing or extra:
        got = f"missing: {', '.join(missing) or 'none'}; left over: {', '.join(extra)}"
        raise _wrong(codes, name, "beside it " + ", ".join(wanted), got)


def _shape(
    name: str,
    parts: Mapping[str, Tensor],
    part: str,
    dtype: str,
    shape: tuple[int, ...],
) -> None:
    found = parts[part]
    if (found.dtype, found.shape) != (dtype, shape):
        raise _wrong(
            found,
            f"{name} ({part})" if part else name,
            f"{dtype} {shape}",
            f"{found.dtype} {found.shape}",
        )


def _wrong(tensor: Tensor, name: str, expected: str, got: str) -> UserError:
    return UserError(
        "a quantized weight is not what config.json and its own tables say",
        where=f"{tensor.file}: {name}",
        expected=expected,
        got=got,
        fix=_AGAIN,
    )
