"""Adam with both moments as 8-bit codes in blocks of 256 (arXiv 2110.02861).

The numbers are those of bitsandbytes' AdamW8bit for the same array: a step decodes the
moments, updates them in float32, moves the weights by these, and encodes them again.
Arrays of fewer than 4096 numbers keep float32 moments. Blocks run over the array as
ftjax keeps it, [layers, *inputs, *outputs]; bitsandbytes' run over [outputs, inputs].
"""

import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftjax.quant.codebooks import DYNAMIC, UNSIGNED
from ftjax.quant.encode import TINY, nearest_code

BLOCK = 256
SMALLEST = 4096  # numbers; an array with fewer is not encoded

Array = jax.Array


@flax.struct.dataclass
class Codes:
    """A moment in about 8.1 bits a number.

    Codes have the shape of the weight, so that they are split over devices as it is;
    the scales, a 64th of their bytes, are whole on every device.
    """

    codes: Array  # uint8, as the weight
    scale: Array  # float32 [ceil(size / 256)], the largest magnitude of each block


Moment = Array | Codes


class _Moved(NamedTuple):
    """Of one weight: its step, and its moments after it."""

    step: Array
    mu: Moment
    nu: Moment


def scale_by_adam8(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with encoded moments."""

    def init(params: Any) -> optax.ScaleByAdamState:
        mu = jax.tree.map(lambda p: _zeros(p, DYNAMIC), params)
        nu = jax.tree.map(lambda p: _zeros(p, UNSIGNED), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any = None
    ) -> tuple[Any, optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        steps = count.astype(jnp.float32)
        first, second = 1 - jnp.float32(b1) ** steps, 1 - jnp.float32(b2) ** steps

        def one(g: Array, m: Moment, v: Moment) -> _Moved:
            mu = b1 * decode(m, DYNAMIC) + (1 - b1) * g
            nu = b2 * decode(v, UNSIGNED) + (1 - b2) * g * g
            step = mu / first / (jnp.sqrt(nu) / jnp.sqrt(second) + eps)
            if not isinstance(m, Codes):
                return _Moved(step, mu, nu)
            return _Moved(step, encode(mu, DYNAMIC), encode(nu, UNSIGNED))

        found = jax.tree.map(one, grads, state.mu, state.nu)
        updates, mu, nu = (
            jax.tree.map(
                lambda moved, i=i: moved[i],
                found,
                is_leaf=lambda leaf: isinstance(leaf, _Moved),
            )
            for i in range(3)
        )
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def encode(values: Array, table: np.ndarray) -> Codes:
    """The nearest codes of `values` over the largest magnitude of their block."""
    blocks = _blocks(values)
    scale = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = blocks * (1 / jnp.maximum(scale, TINY))[..., None]
    codes = nearest_code(table, scaled).reshape(-1)[: values.size]
    return Codes(codes.reshape(values.shape), scale.reshape(-1))


def decode(moment: Moment, table: np.ndarray) -> Array:
    """The moment in float32, in the shape of its weight."""
    if not isinstance(moment, Codes):
        return moment
    blocks = _blocks(moment.codes)
    scale = moment.scale.reshape(*blocks.shape[:-1], 1)
    values = jnp.take(jnp.asarray(table), blocks, mode="clip") * scale
    size = moment.codes.size
    return values.reshape(-1)[:size].reshape(moment.codes.shape)


def _zeros(weight: Array, table: np.ndarray) -> Moment:
    if weight.size < SMALLEST:
        return jnp.zeros_like(weight, jnp.float32)
    zero = int(np.flatnonzero(table == 0)[0])
    scale = jnp.zeros((math.ceil(weight.size / BLOCK),), jnp.float32)
    return Codes(jnp.full_like(weight, zero, jnp.uint8), scale)


def _blocks(x: Array) -> Array:
    """[..., 256], of the flattened array; padded where the last block is short.

    As few axes as can be are joined: one that stays may be split over devices.
    """
    for axis in reversed(range(x.ndim)):
        if math.prod(x.shape[axis:]) % BLOCK == 0:
            return x.reshape(*x.shape[:axis], -1, BLOCK)
    return jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
