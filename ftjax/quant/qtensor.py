"""A quantized weight: packed codes and scales, in the order that is fastest to read.

Weights lie as ftjax keeps them, inputs first. Two 4-bit codes share a byte, the first
half of the inputs in the low nibbles and the second half in the high ones: unpacking is
then two contiguous pieces, one after the other, and no shuffle (measured on CPU: 1.7
times as fast as neighbours that share a byte).

Where blocks run across rows (the inputs are no multiple of the block) the codes stay in
the checkpoint's flat order, and the weight is turned round after it is read.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ftjax.quant.codebooks import DYNAMIC, table
from ftjax.quant.encode import Encoded, encode
from ftjax.quant.formats import NESTED_BLOCK, Format

Array = jax.Array


@flax.struct.dataclass
class QTensor:
    """One weight [*inputs, *outputs] in a few bits a number; never trained.

    I and O are the products of inputs and outputs. A stack of layers adds a leading
    axis to every array.
    """

    codes: Array  # int8 or uint8 [I, O]; 4 bits: uint8 [I/2, O], or flat [IO/2]
    scale: Array  # float32 [I/group, O], or flat [blocks]; uint8 if nested
    zero: Array | None  # uint8 [I/group, O], of affine codes
    nested: Array | None  # float32 [blocks/256]: scales of the scales
    offset: Array | None  # float32 [], the mean of the scales
    format: Format = flax.struct.field(pytree_node=False)
    inputs: tuple[int, ...] = flax.struct.field(pytree_node=False)
    outputs: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for, layers in front."""
        return (*self.stack, *self.inputs, *self.outputs)

    @property
    def stack(self) -> tuple[int, ...]:
        own = 1 if is_flat(self.format, self.inputs) else 2
        return tuple(self.codes.shape[: len(self.codes.shape) - own])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    def dense(self, dtype: Any = jnp.float32) -> Array:
        """The weight [*stack, *inputs, *outputs], computed in float32 and cast."""
        dequantize = _dequantize
        for _ in self.stack:
            dequantize = jax.vmap(dequantize)
        return dequantize(self).astype(dtype)


def is_flat(fmt: Format, inputs: tuple[int, ...]) -> bool:
    """Whether blocks run across rows."""
    return fmt.is_table and math.prod(inputs) % fmt.group != 0


def abstract(
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    fmt: Format,
    stack: tuple[int, ...] = (),
) -> QTensor:
    """The shapes of a quantized weight, by arithmetic: nothing is computed."""
    size_I, size_O = math.prod(inputs), math.prod(outputs)
    flat, half = is_flat(fmt, inputs), fmt.bits == 4
    length = size_I * size_O if flat else size_I
    length = -(-length // 2) if half else length
    signed = fmt.bits == 8 and not fmt.affine
    codes = ((length,) if flat else (length, size_O), jnp.int8 if signed else jnp.uint8)
    blocks = -(-size_I * size_O // fmt.group) if fmt.is_table else 0
    groups = size_I // fmt.group if fmt.group else 1
    scale = ((blocks,) if flat or fmt.double else (groups, size_O), jnp.float32)
    if fmt.double:
        scale = (scale[0], jnp.uint8)
    found = {
        "codes": codes,
        "scale": scale,
        "zero": ((groups, size_O), jnp.uint8) if fmt.affine else None,
        "nested": ((-(-blocks // NESTED_BLOCK),), jnp.float32) if fmt.double else None,
        "offset": ((), jnp.float32) if fmt.double else None,
    }
    shapes: dict[str, Any] = {
        name: None if at is None else jax.ShapeDtypeStruct((*stack, *at[0]), at[1])
        for name, at in found.items()
    }
    return QTensor(**shapes, format=fmt, inputs=inputs, outputs=outputs)


def quantize(
    weight: np.ndarray, inputs: tuple[int, ...], outputs: tuple[int, ...], fmt: Format
) -> QTensor:
    """Quantizes a weight [O, I], as checkpoints have it; arrays on the host."""
    return pack(encode(weight, fmt), inputs, outputs, fmt)


def pack(
    e: Encoded, inputs: tuple[int, ...], outputs: tuple[int, ...], fmt: Format
) -> QTensor:
    """From the order of a checkpoint to that of the memory; exact."""
    flat = is_flat(fmt, inputs)
    codes = e.codes.reshape(-1) if flat else e.codes.T
    if fmt.bits == 4:
        codes = _halves(codes)
    scale, zero = e.scale, None if e.zero is None else e.zero.T
    if not fmt.is_table:
        scale = scale.T
    elif not flat and not fmt.double:
        scale = scale.reshape(math.prod(outputs), -1).T
    arrays: dict[str, Any] = {
        "codes": np.ascontiguousarray(codes),
        "scale": np.ascontiguousarray(scale),
        "zero": None if zero is None else np.ascontiguousarray(zero),
        "nested": e.nested,
        "offset": e.offset,
    }
    return QTensor(**arrays, format=fmt, inputs=inputs, outputs=outputs)


def unpack(q: QTensor) -> Encoded:
    """From the order of the memory to that of a checkpoint; undoes `pack`."""
    fmt, size_I, size_O = q.format, math.prod(q.inputs), math.prod(q.outputs)
    flat = is_flat(fmt, q.inputs)
    codes, scale = np.asarray(q.codes), np.asarray(q.scale)
    if fmt.bits == 4:
        codes = _whole(codes, size_I * size_O if flat else size_I)
    codes = codes.reshape(size_O, size_I) if flat else codes.T
    if not fmt.is_table:
        scale = scale.T
    elif not flat and not fmt.double:
        scale = scale.T.reshape(-1)
    zero, nested, offset = (
        None if x is None else np.asarray(x) for x in (q.zero, q.nested, q.offset)
    )
    zero = None if zero is None else zero.T
    return Encoded(codes, scale, zero, nested, offset)


def _halves(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte: the first half of the first axis low, the second half high."""
    half = -(-codes.shape[0] // 2)
    high = np.zeros((half, *codes.shape[1:]), np.uint8)
    high[: codes.shape[0] - half] = codes[half:]
    return codes[:half] | (high << 4)


def _whole(packed: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([packed & 15, packed >> 4])[:count]


def _dequantize(q: QTensor) -> Array:
    """One layer's weight, float32 [*inputs, *outputs]."""
    fmt, size_I, size_O = q.format, math.prod(q.inputs), math.prod(q.outputs)
    flat = is_flat(fmt, q.inputs)
    codes = q.codes
    if fmt.bits == 4:
        codes = jnp.concatenate([codes & 15, codes >> 4])
        codes = codes[: size_I * size_O if flat else size_I]
    if fmt.is_table:
        values = jnp.take(jnp.asarray(table(fmt.name)), codes, mode="clip")
        scale = _scales(q)
        if flat:
            spread = jnp.repeat(scale, fmt.group)[: size_I * size_O]
            return (values * spread).reshape(size_O, size_I).T.reshape(q.shape)
        return _spread(values, scale).reshape(q.shape)
    values = codes.astype(jnp.float32)
    if q.zero is not None:
        values = _spread(values, q.zero.astype(jnp.float32), jnp.subtract)
        return _spread(values, q.scale).reshape(q.shape)
    most = np.float32(2 ** (fmt.bits - 1) - 1)
    if fmt.bits == 4:
        values = values - 8
    return _spread(values, q.scale / most).reshape(q.shape)


def _scales(q: QTensor) -> Array:
    """The scales of a table format, float32, out of their own codes if need be.

    [I/group, O], or [blocks] where those run across rows.
    """
    if q.nested is None or q.offset is None:
        return q.scale
    codes, blocks = q.scale, jnp.repeat(q.nested, NESTED_BLOCK)[: q.scale.size]
    if not is_flat(q.format, q.inputs):
        # Before the table is read: XLA keeps what comes out of a table, and would turn
        # it round at each number of the weight (measured on CPU: 2.4 times as slow).
        codes, blocks = (x.reshape(math.prod(q.outputs), -1).T for x in (codes, blocks))
    return jnp.take(jnp.asarray(DYNAMIC), codes, mode="clip") * blocks + q.offset


def _spread(values_IO: Array, scale_GO: Array, apply: Any = jnp.multiply) -> Array:
    """Applies one number to each group of inputs."""
    grouped = values_IO.reshape(scale_GO.shape[0], -1, values_IO.shape[1])
    return apply(grouped, scale_GO[:, None, :]).reshape(values_IO.shape)
