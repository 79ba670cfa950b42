"""Walking over positions in chunks: what every loss with a head of its own shares.

Positions without weight are moved to the end of each row, where no walk reaches them; a
chunk is `[B, C, ...]`, the same span of every row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftjax.weights import Array


class Order(NamedTuple):
    """The positions of each row, the weighted ones first, padded to whole chunks."""

    there_BP: Array  # [B, P], for `arrange`; P is T rounded up to whole chunks
    back_BT: Array  # [B, T], what undoes it, for `reorder`
    chunks: Array  # [], int32, the chunks that hold a weighted position


def weighted_first(weights_BT: Array, chunk: int) -> Order:
    """The order in which a walk of `chunk` positions at a time visits the rows."""
    length = weights_BT.shape[1]
    count = jnp.max(jnp.sum(weights_BT != 0, axis=1))
    there = jnp.argsort(_pad(weights_BT, chunk) == 0, axis=1, stable=True)
    back = jnp.argsort(there, axis=1)[:, :length]
    return Order(there, back, -(-count // chunk))


def arrange(array: Array, order: Order, chunk: int) -> Array:
    """[B, T, ...] in the order of the walk, [B, P, ...], padded with zeros."""
    return reorder(_pad(array, chunk), order.there_BP)


def reorder(array: Array, order_BT: Array) -> Array:
    """Reorders the positions of each row of an array [B, T, ...]."""
    extra = (1,) * (array.ndim - 2)
    order = order_BT.reshape(order_BT.shape + extra)
    return jnp.take_along_axis(array, order, axis=1)


def cut(array: Array, index: Array, size: int) -> Array:
    """The chunk `index` of an array [B, P, ...]."""
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis=1)


def paste(array: Array, part: Array, index: Array) -> Array:
    """The array [B, P, ...] with its chunk `index` replaced."""
    start = index * part.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(array, part, start, axis=1)


def head_logits(hidden_BCD: Array, matrix_DV: Array) -> Array:
    """The logits of a chunk [B, C, V], accumulated in float32."""
    return jnp.einsum(
        "BCD,DV->BCV", hidden_BCD, matrix_DV, preferred_element_type=jnp.float32
    )


def ranked_first(below_BC1: Array, exps_BCV: Array) -> Array:
    """1 where the target's logit is the highest, else 0; [B, C] float32.

    A tie is shared: 1/n among n, so that a model of equal logits is right by chance.

    Args:
      below_BC1: the target's logit, less the highest.
      exps_BCV: exp of every logit less the highest: 1 at the highest.
    """
    ties = jnp.sum(exps_BCV == 1, axis=-1, dtype=jnp.float32)
    is_top = (jnp.exp(below_BC1) == 1)[..., 0].astype(jnp.float32)
    return is_top / jnp.maximum(ties, 1.0)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Wanted:
    """Which gradients are: no leaf, so that it is known when tracing."""

    to_hidden: bool
    to_head: bool


def gradients(
    hidden_BTD: Array,
    head_DV: Array,
    order: Order,
    chunk: int,
    wanted: Wanted,
    error: Callable[[Array], Array],
) -> tuple[Array | None, Array | None]:
    """The gradients of hidden states and head that are wanted, by a walk.

    `error(i)` makes the gradient of the logits of chunk i, [B, C, V] float32.
    """
    rows = arrange(hidden_BTD, order, chunk)
    matrix = head_DV.astype(rows.dtype)

    def body(i: Array, carry: Any) -> Any:
        dhidden, dhead = carry
        error_BCV = error(i).astype(rows.dtype)
        if wanted.to_hidden:
            dhidden = paste(dhidden, jnp.einsum("BCV,DV->BCD", error_BCV, matrix), i)
        if wanted.to_head:
            dhead = dhead + head_gradient(cut(rows, i, chunk), error_BCV)
        return dhidden, dhead

    start = (
        jnp.zeros_like(rows) if wanted.to_hidden else None,
        jnp.zeros(head_DV.shape, jnp.float32) if wanted.to_head else None,
    )
    dhidden, dhead = jax.lax.fori_loop(0, order.chunks, body, start)
    dhidden = reorder(dhidden, order.back_BT) if wanted.to_hidden else None
    dhead = dhead.astype(head_DV.dtype) if wanted.to_head else None
    return dhidden, dhead


def head_gradient(hidden_BCD: Array, error_BCV: Array) -> Array:
    """What a chunk adds to the gradient of the head [D, V], in float32."""
    return jnp.einsum(
        "BCD,BCV->DV", hidden_BCD, error_BCV, preferred_element_type=jnp.float32
    )


def one_hot(targets_BC: Array, shape: tuple[int, ...]) -> Array:
    """float32 [B, C, V], made of an iota: it fuses and is never stored."""
    vocab = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    return (vocab == targets_BC[..., None]).astype(jnp.float32)


def _pad(array: Array, chunk: int) -> Array:
    pad = ((0, 0), (0, -array.shape[1] % chunk)) + ((0, 0),) * (array.ndim - 2)
    return jnp.pad(array, pad)
