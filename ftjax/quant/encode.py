"""From floats to codes and scales, for one weight [outputs, inputs].

Table formats give bitsandbytes' codes and scales to the bit, ties and partial blocks
included; so does int8, symmetric per channel. One number may differ in its last bit:
the mean of the scales under double quantization, which torch adds up in an order that
depends on the machine, and which is rounded once here. Everything runs on the host's
processor, one weight at a time, whatever the accelerator.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.quant.codebooks import DYNAMIC, ascending
from ftjax.quant.formats import NESTED_BLOCK, Format

TINY = np.float32(1e-38)  # stands in for the largest number of a block of zeros


class Encoded(NamedTuple):
    """One weight in the order of the checkpoint: nothing is packed yet.

    Attributes:
      codes: uint8 (int8 for symmetric int8) [outputs, inputs].
      scale: float32, the largest magnitude. Tables: [blocks], or their uint8 codes
        under double quantization. Integers: [outputs, groups]; affine: the step.
      zero: uint8 [outputs, groups] of affine codes, else None.
      nested: float32 [blocks / 256], double quantization's scales of scales, else None.
      offset: float32 [], added to the scales that `nested` gives, else None.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None = None
    nested: np.ndarray | None = None
    offset: np.ndarray | None = None


def encode(weight: np.ndarray, fmt: Format) -> Encoded:
    """Quantizes a weight [outputs, inputs] of any float type.

    Affine int8 of four numbers, by hand: the range is 1.39 + 0.89 = 2.28, the scale
    2.28 / 255, and -0.89 becomes code 0.

    >>> w = np.array([[0.12, 0.57, -0.89, 1.39]], np.float32)
    >>> e = encode(w, Format('int8', 0, affine=True))
    >>> e.codes.tolist(), int(e.zero[0, 0]), round(float(e.scale[0, 0]), 5)
    ([[113, 164, 0, 255]], 100, 0.00894)
    >>> values = (e.codes.astype(np.float32) - e.zero) * e.scale
    >>> [round(float(v), 4) for v in values[0]]
    [0.1162, 0.5722, -0.8941, 1.3859]
    """
    with jax.default_device(host_device()):
        if fmt.is_table:
            return _encode_table(jnp.asarray(weight).astype(jnp.float32), fmt)
        return _encode_integers(jnp.asarray(weight), fmt)


def host_device() -> jax.Device:
    """The processor of the host, whatever the accelerator."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the processor out
        return jax.local_devices()[0]


def _encode_table(weight_OI: jax.Array, fmt: Format) -> Encoded:
    flat, block = weight_OI.reshape(-1), fmt.group
    codes, scale = _table_codes(flat, fmt.name, block)
    shaped = np.asarray(codes).reshape(weight_OI.shape)
    if not fmt.double:
        return Encoded(shaped, np.asarray(scale))
    scale = np.asarray(scale)
    offset = np.float32(scale.astype(np.float64).mean())
    centred = jnp.asarray(scale - offset)
    codes8, nested = _dynamic_codes(centred)
    return Encoded(
        shaped, np.asarray(codes8), None, np.asarray(nested), np.asarray(offset)
    )


@partial(jax.jit, static_argnames=("name", "block"))
def _table_codes(flat: jax.Array, name: str, block: int) -> tuple[jax.Array, jax.Array]:
    """Codes [n] and the largest magnitude of each block."""
    full = flat.size // block * block
    blocks, rest = flat[:full].reshape(-1, block), flat[full:]
    scale = jnp.max(jnp.abs(blocks), axis=1, initial=0)
    # A product with the reciprocal, and a quotient in the partial block, as in the
    # original: the two round differently.
    scaled = (blocks * (1 / jnp.maximum(scale, TINY))[:, None]).reshape(-1)
    if rest.size:
        last = jnp.maximum(jnp.max(jnp.abs(rest)), TINY)
        scaled = jnp.concatenate([scaled, rest / last])
        scale = jnp.concatenate([scale, last[None]])
    middle, order = ascending(name)
    rank = jnp.zeros(scaled.shape, jnp.uint8)
    for edge in jnp.clip(jnp.asarray(middle), -1, 1):
        rank += (scaled > edge).astype(jnp.uint8)
    codes = rank if name == "nf4" else jnp.take(jnp.asarray(order), rank, mode="clip")
    return codes, scale


@jax.jit
def _dynamic_codes(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest 8-bit dynamic codes of values / the largest of each 256."""
    count = values.size
    padded = jnp.pad(values, (0, -count % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    nested = jnp.max(jnp.abs(padded), axis=1)
    scaled = (padded * (1 / jnp.maximum(nested, TINY))[:, None]).reshape(-1)[:count]
    codes = nearest_code(DYNAMIC, scaled)
    # A block of zeros, as when there is one scale and so nothing beside the mean.
    empty = jnp.repeat(nested == 0, NESTED_BLOCK)[:count]
    return jnp.where(empty, jnp.uint8(0), codes), nested


def nearest_code(table: np.ndarray, scaled: jax.Array) -> jax.Array:
    """The uint8 codes of the nearest of 256 ascending values; at a tie, the lower."""
    values = jnp.asarray(table)
    above = jnp.clip(jnp.searchsorted(values, scaled), 1, 255)
    low, high = values[above - 1], values[above]
    nearer_low = scaled - low <= high - scaled
    return jnp.where(nearer_low, above - 1, above).astype(jnp.uint8)


def _encode_integers(weight_OI: jax.Array, fmt: Format) -> Encoded:
    outputs, inputs = weight_OI.shape
    group = fmt.group or inputs
    if fmt == Format("int8", 0):
        # bitsandbytes rounds to float16 first.
        weight_OI = weight_OI.astype(jnp.float16)
    grouped = weight_OI.astype(jnp.float32).reshape(outputs, -1, group)
    codes, scale, zero = _integer_codes(grouped, fmt.bits, fmt.affine)
    return Encoded(
        np.asarray(codes).reshape(outputs, inputs),
        np.asarray(scale),
        np.asarray(zero) if fmt.affine else None,
    )


@partial(jax.jit, static_argnames=("bits", "affine"))
def _integer_codes(
    w_OGI: jax.Array, bits: int, affine: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    if affine:
        most = np.float32(2**bits - 1)
        low, high = jnp.min(w_OGI, axis=2), jnp.max(w_OGI, axis=2)
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)  # zero must be exact
        scale = jnp.maximum((high - low) / most, TINY)
        zero = jnp.clip(jnp.round(-low / scale), 0, most)
        codes = jnp.round(w_OGI / scale[..., None]) + zero[..., None]
        return jnp.clip(codes, 0, most).astype(jnp.uint8), scale, zero.astype(jnp.uint8)
    most = np.float32(2 ** (bits - 1) - 1)
    largest = jnp.max(jnp.abs(w_OGI), axis=2)
    codes = jnp.round(w_OGI * (most / jnp.maximum(largest, TINY))[..., None])
    codes = jnp.clip(codes, -most, most).astype(jnp.int8)
    if bits == 4:
        codes = (codes + 8).astype(jnp.uint8)
    return codes, largest, jnp.zeros(())
