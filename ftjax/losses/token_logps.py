"""The log-probability of every token by itself, without ever holding all logits.

What preference and reinforcement losses need: they are not linear in the
log-probabilities, so the gradient of a token is known only after the forward pass.
Unlike `logprobs.chunked_nll`, the logits of a chunk are therefore made twice, forward
and backward; kept between the two are the inputs and one number per token.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ftjax.losses.chunks import (
    Order,
    Wanted,
    arrange,
    cut,
    gradients,
    head_logits,
    one_hot,
    paste,
    ranked_first,
    reorder,
    weighted_first,
)
from ftjax.weights import Array


class TokenLogps(NamedTuple):
    """Per token, [B, T] float32, all 0 where the weight is 0.

    Gradients flow through `logp_BT` and `mean_logp_BT` alone.
    """

    logp_BT: Array  # log softmax(logits)[target]
    entropy_BT: Array  # -sum_v p_v log p_v, nats
    correct_BT: Array  # 1 where the target is ranked first, 1/n of n ties
    mean_logit_BT: Array  # the mean of the logits over the vocabulary
    mean_logp_BT: Array  # the mean of log p_v over the vocabulary: for label smoothing


def token_logps(
    hidden_BTD: Array,
    head_DV: Array,
    targets_BT: Array,
    weights_BT: Array,
    chunk: int,
    *,
    temperature: float | Array = 1.0,
) -> TokenLogps:
    """log p(target) of each token, p = softmax(hidden . head / temperature).

    The softmax is in float32. Gradients flow to `hidden_BTD` and `head_DV`; that of a
    head that is frozen is not computed.

    Args:
      hidden_BTD: in the dtype of the computation.
      head_DV: the output matrix.
      targets_BT: int32 in [0, V).
      weights_BT: 0 for positions that do not count: they cost nothing and give 0. Other
        values are not looked at.
      chunk: positions per row that are handled at a time; memory is B * chunk * V.
      temperature: a scalar above 0, by which all logits are divided; no gradient.
    """
    scale = jnp.asarray(temperature, jnp.float32)
    inputs = _Inputs(hidden_BTD, head_DV, targets_BT, weights_BT, scale)
    logp, *others, mean_logp = _token_logps(chunk, inputs)
    entropy, correct, mean_logit = jax.lax.stop_gradient(others)
    return TokenLogps(logp, entropy, correct, mean_logit, mean_logp)


class _Inputs(NamedTuple):
    hidden: Any
    head: Any
    targets: Any
    weights: Any
    temperature: Any


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logps(chunk: int, inputs: _Inputs) -> tuple[Array, ...]:
    return _walk(chunk, inputs)[0]


def _forward(chunk: int, primals: _Inputs) -> Any:
    inputs = _Inputs(*(primal.value for primal in primals))
    found, lse_BP = _walk(chunk, inputs)
    wanted = Wanted(primals.hidden.perturbed, primals.head.perturbed)
    return found, (inputs, lse_BP, wanted)


def _backward(chunk: int, saved: Any, cotangents: Any) -> Any:
    logp, *_, mean_logp = cotangents
    nought = [isinstance(g, SymbolicZero) for g in (logp, mean_logp)]
    if all(nought):
        return (None,)
    inputs, lse_BP, wanted = saved
    zeros = jnp.zeros(logp.shape, jnp.float32)
    g_BT = zeros if nought[0] else logp
    h_BT = None if nought[1] else mean_logp
    dhidden, dhead = _walk_back(chunk, inputs, lse_BP, wanted, g_BT, h_BT)
    return (_Inputs(dhidden, dhead, None, None, None),)


_token_logps.defvjp(_forward, _backward, symbolic_zeros=True)


class _Rows(NamedTuple):
    hidden: Array  # [B, C, D]
    targets: Array  # [B, C]


def _rows(inputs: _Inputs, order: Order, chunk: int) -> _Rows:
    return _Rows(*(arrange(x, order, chunk) for x in (inputs.hidden, inputs.targets)))


def _walk(chunk: int, inputs: _Inputs) -> tuple[tuple[Array, ...], Array]:
    """The results, and the log sum exp [B, P] in the order of the walk."""
    hidden, head, _, weights, temperature = inputs
    chunk = min(chunk, hidden.shape[1])
    order = weighted_first(weights, chunk)
    rows = _rows(inputs, order, chunk)
    matrix = head.astype(hidden.dtype)

    def body(i: Array, carry: Any) -> Any:
        part = _Rows(*(cut(array, i, chunk) for array in rows))
        found = _chunk(part, matrix, temperature)
        return [paste(all_, new, i) for all_, new in zip(carry, found, strict=True)]

    start = [jnp.zeros(rows.targets.shape, jnp.float32)] * 6
    *found, lse_BP = jax.lax.fori_loop(0, order.chunks, body, start)
    counts = weights != 0
    results = (jnp.where(counts, reorder(x, order.back_BT), 0) for x in found)
    return tuple(results), lse_BP


def _chunk(rows: _Rows, matrix: Array, temperature: Array) -> tuple[Array, ...]:
    """The fields of `TokenLogps` and the log sum exp of a chunk, each [B, C]."""
    logits = head_logits(rows.hidden, matrix) / temperature
    top = jnp.max(logits, axis=-1, keepdims=True)
    exps = jnp.exp(logits - top)
    norm = jnp.sum(exps, axis=-1)
    lse = top[..., 0] + jnp.log(norm)
    at = jnp.take_along_axis(logits, rows.targets[..., None], axis=-1)
    # Below the top, so that large logits do not cancel.
    below = jnp.sum(exps * (logits - top), axis=-1) / norm
    return (
        (at - top)[..., 0] - jnp.log(norm),
        jnp.log(norm) - below,
        ranked_first(at - top, exps),
        jnp.mean(logits, axis=-1),
        jnp.mean(logits - top, axis=-1) - jnp.log(norm),
        lse,
    )


def _walk_back(
    chunk: int,
    inputs: _Inputs,
    lse_BP: Array,
    wanted: Wanted,
    g_BT: Array,
    h_BT: Array | None,
) -> tuple[Any, Any]:
    """The gradients that are wanted, each chunk's logits made anew.

    `g_BT` is the cotangent of `logp_BT`, `h_BT` that of `mean_logp_BT`.
    """
    hidden, head, _, weights, temperature = inputs
    chunk = min(chunk, hidden.shape[1])
    order = weighted_first(weights, chunk)
    rows = _rows(inputs, order, chunk)
    # What does not count may share a chunk with what does.
    g_BP = arrange(jnp.where(weights != 0, g_BT / temperature, 0), order, chunk)
    if h_BT is not None:
        h_BP = arrange(jnp.where(weights != 0, h_BT / temperature, 0), order, chunk)
    matrix = head.astype(hidden.dtype)

    def error(i: Array) -> Array:
        part = _Rows(*(cut(array, i, chunk) for array in rows))
        logits = head_logits(part.hidden, matrix) / temperature
        probs = jnp.exp(logits - cut(lse_BP, i, chunk)[..., None])
        g = cut(g_BP, i, chunk)[..., None]
        found = g * (one_hot(part.targets, logits.shape) - probs)
        if h_BT is not None:
            h = cut(h_BP, i, chunk)[..., None]
            found = found + h * (1 / logits.shape[-1] - probs)
        return found

    return gradients(hidden, head, order, chunk, wanted, error)
