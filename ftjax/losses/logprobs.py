"""The head and the log-probability as one function: no [B, T, V] array, ever.

`chunked_nll` walks over the positions in chunks and keeps, of each chunk's logits, only
what the loss and its gradient need. Since the loss is linear in the log-probabilities
with weights that are known beforehand, the gradient is made in the forward pass, while
the chunk's logits are at hand: they are computed once. Positions without weight are
moved to the end of each row and never reach the head.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftjax.weights import Array


class NLL(NamedTuple):
    """Sums over the weighted positions; `correct` and `logp_BT` carry no gradient."""

    sum: Array  # [], sum of weight * -log p
    correct: Array  # [], weight of positions whose target has the highest logit
    logp_BT: Array  # [B, T] float32, log p(target); 0 where the weight is 0


def chunked_nll(
    hidden_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array, chunk: int
) -> NLL:
    """Weighted negative log-likelihood of the targets: the loss of SFT and causal LM.

    -sum_bt weight_bt log softmax(hidden_bt . head)[target_bt], the softmax in float32.
    A gradient flows to `hidden_BTD` and `head_DV` and through `sum` alone. An unused
    gradient of the head (it is frozen in LoRA) is not computed.

    Args:
      hidden_BTD: in the dtype of the computation.
      head_DV: the output matrix.
      targets_BT: int32 in [0, V).
      weights_BT: float32; 0 for positions that do not count.
      chunk: positions per row that are handled at a time; memory is B * chunk * V.
    """
    total, correct, logp = _nll(chunk, hidden_BTD, head_DV, targets_BT, weights_BT)
    return NLL(total, jax.lax.stop_gradient(correct), jax.lax.stop_gradient(logp))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(chunk: int, hidden: Array, head: Array, targets: Array, weights: Array) -> Any:
    return _walk(chunk, hidden, head, targets, weights, to_hidden=False, to_head=False)[
        0
    ]


def _forward(chunk: int, hidden: Any, head: Any, targets: Any, weights: Any) -> Any:
    return _walk(
        chunk,
        *(arg.value for arg in (hidden, head, targets, weights)),
        to_hidden=hidden.perturbed,
        to_head=head.perturbed,
    )


def _backward(chunk: int, saved: Any, cotangents: Any) -> Any:
    g = cotangents[0]
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    dhidden, dhead = saved
    if dhidden is not None:
        dhidden = (dhidden * g.astype(dhidden.dtype)).astype(dhidden.dtype)
    if dhead is not None:
        dhead = dhead * g
    return dhidden, dhead, None, None


_nll.defvjp(_forward, _backward, symbolic_zeros=True)


def _walk(
    chunk: int,
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    *,
    to_hidden: bool,
    to_head: bool,
) -> tuple[Any, Any]:
    """(sum, correct, logp), and the gradients of the sum that were asked for."""
    batch, length, dim = hidden.shape
    chunk = min(chunk, length)
    padded = -(-length // chunk) * chunk
    pad = ((0, 0), (0, padded - length))
    targets, weights = jnp.pad(targets, pad), jnp.pad(weights, pad)
    # Weighted positions first, in order; the same permutation undone at the end.
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)[:, :length]
    hidden_in = _rows(jnp.pad(hidden, (*pad, (0, 0))), order)
    targets = jnp.take_along_axis(targets, order, axis=1)
    weights = jnp.take_along_axis(weights, order, axis=1)
    count = jnp.max(jnp.sum(weights != 0, axis=1))
    matrix = head.astype(hidden.dtype)

    def body(i: Array, carry: Any) -> Any:
        total, correct, logp, dhidden, dhead = carry
        cut = partial(_slice, start=i * chunk, size=chunk)
        h, t, w = cut(hidden_in), cut(targets), cut(weights)
        logits = jnp.einsum(
            "BCD,DV->BCV", h, matrix, preferred_element_type=jnp.float32
        )
        top = jnp.max(logits, axis=-1, keepdims=True)
        exps = jnp.exp(logits - top)
        norm = jnp.sum(exps, axis=-1, keepdims=True)
        at = jnp.take_along_axis(logits, t[..., None], axis=-1)
        lp = (at - top - jnp.log(norm))[..., 0]
        total = total - jnp.sum(w * lp)
        correct = correct + jnp.sum(w * (at == top)[..., 0].astype(w.dtype))
        lp = jnp.where(w != 0, lp, 0)
        logp = jax.lax.dynamic_update_slice_in_dim(logp, lp, i * chunk, axis=1)
        if to_hidden or to_head:
            vocab = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
            hit = (vocab == t[..., None]).astype(jnp.float32)
            error = (exps * (w[..., None] / norm) - hit * w[..., None]).astype(h.dtype)
        if to_hidden:
            dh = jnp.einsum("BCV,DV->BCD", error, matrix)
            dhidden = jax.lax.dynamic_update_slice_in_dim(
                dhidden, dh, i * chunk, axis=1
            )
        if to_head:
            dhead = dhead + jnp.einsum(
                "BCD,BCV->DV", h, error, preferred_element_type=jnp.float32
            )
        return total, correct, logp, dhidden, dhead

    start = (
        jnp.zeros((), jnp.float32),
        jnp.zeros((), jnp.float32),
        jnp.zeros((batch, padded), jnp.float32),
        jnp.zeros((batch, padded, dim), hidden.dtype) if to_hidden else None,
        jnp.zeros(head.shape, jnp.float32) if to_head else None,
    )
    total, correct, logp, dhidden, dhead = jax.lax.fori_loop(
        0, -(-count // chunk), body, start
    )
    logp = jnp.take_along_axis(logp, back, axis=1)
    dhidden = _rows(dhidden, back) if to_hidden else None
    dhead = dhead.astype(head.dtype) if to_head else None
    return (total, correct, logp), (dhidden, dhead)


def _slice(array: Array, *, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis=1)


def _rows(array_BTD: Array, order_BT: Array) -> Array:
    """Reorders the positions of each row."""
    return jnp.take_along_axis(array_BTD, order_BT[..., None], axis=1)
