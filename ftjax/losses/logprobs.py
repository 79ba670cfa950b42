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

from ftjax.losses.chunks import (
    arrange,
    cut,
    head_gradient,
    head_logits,
    one_hot,
    paste,
    ranked_first,
    reorder,
    weighted_first,
)
from ftjax.losses.token_losses import label_smoothed
from ftjax.weights import Array


class NLL(NamedTuple):
    """Sums over the weighted positions; `correct` and `logp_BT` carry no gradient."""

    sum: Array  # [], sum of weight * -log p, smoothed where that is asked for
    correct: Array  # [], weight of positions whose target is ranked first
    logp_BT: Array  # [B, T] float32, log p(target); 0 where the weight is 0


def chunked_nll(
    hidden_BTD: Array,
    head_DV: Array,
    targets_BT: Array,
    weights_BT: Array,
    chunk: int,
    *,
    label_smoothing: float = 0.0,
) -> NLL:
    """Weighted negative log-likelihood of the targets: the loss of SFT and causal LM.

    -sum_bt weight_bt log softmax(hidden_bt . head)[target_bt], the softmax in float32;
    with smoothing eps, (1 - eps) of it and eps of the mean over the vocabulary, as
    `token_losses.label_smoothed`. A gradient flows to `hidden_BTD` and `head_DV` and
    through `sum` alone. An unused gradient of the head (it is frozen in LoRA) is not
    computed.

    Args:
      hidden_BTD: in the dtype of the computation.
      head_DV: the output matrix.
      targets_BT: int32 in [0, V).
      weights_BT: float32; 0 for positions that do not count.
      chunk: positions per row that are handled at a time; memory is B * chunk * V.
      label_smoothing: eps, in [0, 1).
    """
    how = _How(chunk, label_smoothing)
    total, correct, logp = _nll(how, hidden_BTD, head_DV, targets_BT, weights_BT)
    return NLL(total, jax.lax.stop_gradient(correct), jax.lax.stop_gradient(logp))


class _How(NamedTuple):
    chunk: int
    smoothing: float


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(how: _How, hidden: Array, head: Array, targets: Array, weights: Array) -> Any:
    wanted = {"to_hidden": False, "to_head": False}
    return _walk(how, hidden, head, targets, weights, **wanted)[0]


def _forward(how: _How, hidden: Any, head: Any, targets: Any, weights: Any) -> Any:
    return _walk(
        how,
        *(arg.value for arg in (hidden, head, targets, weights)),
        to_hidden=hidden.perturbed,
        to_head=head.perturbed,
    )


def _backward(how: _How, saved: Any, cotangents: Any) -> Any:
    g = cotangents[0]
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    dhidden, dhead = saved
    if dhidden is not None:
        # The factor is 1 / tokens, which bfloat16 would round by as much as 0.4 %.
        dhidden = (dhidden.astype(jnp.float32) * g).astype(dhidden.dtype)
    if dhead is not None:
        dhead = (dhead.astype(jnp.float32) * g).astype(dhead.dtype)
    return dhidden, dhead, None, None


_nll.defvjp(_forward, _backward, symbolic_zeros=True)


def _walk(
    how: _How,
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
    chunk = min(how.chunk, length)
    order = weighted_first(weights, chunk)
    rows = _Rows(*(arrange(x, order, chunk) for x in (hidden, targets, weights)))
    matrix = head.astype(hidden.dtype)

    def body(i: Array, carry: Any) -> Any:
        total, correct, logp, dhidden, dhead = carry
        part = _Rows(*(cut(array, i, chunk) for array in rows))
        wanted = to_hidden or to_head
        found, error = _chunk(part, matrix, how.smoothing, with_error=wanted)
        if to_hidden:
            dh = jnp.einsum("BCV,DV->BCD", error, matrix)
            dhidden = paste(dhidden, dh, i)
        if to_head:
            dhead = dhead + head_gradient(part.hidden, error)
        logp = paste(logp, found.logp_BT, i)
        return total + found.sum, correct + found.correct, logp, dhidden, dhead

    padded, zero = rows.weights.shape[1], jnp.zeros((), jnp.float32)
    start = (
        zero,
        zero,
        jnp.zeros((batch, padded), jnp.float32),
        jnp.zeros((batch, padded, dim), hidden.dtype) if to_hidden else None,
        jnp.zeros(head.shape, jnp.float32) if to_head else None,
    )
    done = jax.lax.fori_loop(0, order.chunks, body, start)
    total, correct, logp, dhidden, dhead = done
    logp = reorder(logp, order.back_BT)
    dhidden = reorder(dhidden, order.back_BT) if to_hidden else None
    dhead = dhead.astype(head.dtype) if to_head else None
    return (total, correct, logp), (dhidden, dhead)


class _Rows(NamedTuple):
    hidden: Array  # [B, C, D]
    targets: Array  # [B, C]
    weights: Array  # [B, C]


def _chunk(
    rows: _Rows, matrix: Array, eps: float, *, with_error: bool
) -> tuple[NLL, Any]:
    """The sums of one chunk, and the gradient of their logits [B, C, V]."""
    hidden, targets, weights = rows
    logits = head_logits(hidden, matrix)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exps = jnp.exp(logits - top)
    norm = jnp.sum(exps, axis=-1, keepdims=True)
    at = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    logp = (at - top - jnp.log(norm))[..., 0]
    loss = -logp
    if eps:
        mean_logp = jnp.mean(logits - top, axis=-1) - jnp.log(norm[..., 0])
        loss = label_smoothed(logp, mean_logp, label_smoothing=eps)
    found = NLL(
        jnp.sum(weights * loss),
        jnp.sum(weights * ranked_first(at - top, exps)),
        jnp.where(weights != 0, logp, 0),
    )
    if not with_error:
        return found, None
    hit = one_hot(targets, logits.shape)
    if eps:
        hit = (1 - eps) * hit + eps / logits.shape[-1]
    error = exps * (weights[..., None] / norm) - hit * weights[..., None]
    return found, error.astype(hidden.dtype)
