"""Distillation of a teacher's distribution into a student, token by token, in chunks.

The divergence of two softmaxes over the same vocabulary, from the last hidden states of
both models: no [B, T, V] array of either exists. The logits of a chunk are made twice,
forward and backward; only the inputs are kept. `beta` is that of generalized knowledge
distillation (arXiv 2306.13649, eq. 1) as in TRL 1.16: 0 is the forward KL, 1 the
reverse one. Both softmaxes have the temperature; the loss is not multiplied by its
square.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ftjax.losses.chunks import (
    Wanted,
    arrange,
    cut,
    gradients,
    head_logits,
    paste,
    reorder,
    weighted_first,
)
from ftjax.losses.pairs import Scalar
from ftjax.weights import Array


class Model(NamedTuple):
    """A model's last hidden states and its head; widths may differ between models."""

    hidden_BTD: Array
    head_DV: Array


class Divergence(NamedTuple):
    """Per token, [B, T] float32, 0 where the weight is 0."""

    loss_BT: Array  # the divergence, nats; a gradient flows to the student
    entropy_BT: Array  # of the student; no gradient


def forward_kl(s: Array, t: Array, beta: Array) -> tuple[Array, Array]:
    """sum_v t log(t / s), and its slope by the student's logits.

    Args:
      s: the student's log-probabilities, [..., V].
      t: the teacher's.
      beta: not read.
    """
    value = jnp.sum(jnp.exp(t) * (t - s), axis=-1)
    return value, jnp.exp(s) - jnp.exp(t)


def reverse_kl(s: Array, t: Array, beta: Array) -> tuple[Array, Array]:
    """sum_v s log(s / t), and its slope by the student's logits."""
    value = jnp.sum(jnp.exp(s) * (s - t), axis=-1)
    return value, jnp.exp(s) * (s - t - value[..., None])


def js_divergence(s: Array, t: Array, beta: Array) -> tuple[Array, Array]:
    """beta KL(t, m) + (1 - beta) KL(s, m), m = beta t + (1 - beta) s; and its slope.

    beta must be inside (0, 1): at its ends this is 0.
    """
    m = jnp.logaddexp(s + jnp.log1p(-beta), t + jnp.log(beta))
    of_teacher = jnp.sum(jnp.exp(t) * (t - m), axis=-1)
    of_student = jnp.sum(jnp.exp(s) * (s - m), axis=-1)
    slope = (1 - beta) * jnp.exp(s) * (s - m - of_student[..., None])
    return beta * of_teacher + (1 - beta) * of_student, slope


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js_divergence": js_divergence,
}


def distill(
    student: Model,
    teacher: Model,
    weights_BT: Array,
    chunk: int,
    *,
    divergence: str,
    beta: Scalar = 0.5,
    temperature: Scalar = 1.0,
) -> Divergence:
    """The divergence of the student from the teacher, at each token.

    Args:
      student: gets the gradient.
      teacher: gets none.
      weights_BT: 0 for positions that do not count: they cost nothing and give 0. Other
        values are not looked at.
      chunk: positions per row that are handled at a time; memory is B * chunk * V.
      divergence: a name of `DIVERGENCES`.
      beta: of `js_divergence`.
      temperature: above 0; divides the logits of both.
    """
    numbers = [jnp.asarray(x, jnp.float32) for x in (beta, temperature)]
    inputs = _Inputs(*student, *jax.lax.stop_gradient(teacher), weights_BT, *numbers)
    loss, entropy = _distill(chunk, divergence, inputs)
    return Divergence(loss, jax.lax.stop_gradient(entropy))


class _Inputs(NamedTuple):
    hidden: Any
    head: Any
    teacher_hidden: Any
    teacher_head: Any
    weights: Any
    beta: Any
    temperature: Any


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _distill(chunk: int, divergence: str, inputs: _Inputs) -> tuple[Array, Array]:
    chunk, order, parts = _walk(chunk, divergence, inputs)

    def body(i: Array, carry: Any) -> Any:
        loss, entropy = carry
        s, (value, _) = parts(i)
        spread = -jnp.sum(jnp.exp(s) * s, axis=-1)
        return paste(loss, value, i), paste(entropy, spread, i)

    start = (jnp.zeros(order.there_BP.shape, jnp.float32),) * 2
    found = jax.lax.fori_loop(0, order.chunks, body, start)
    counts = inputs.weights != 0
    loss, entropy = (jnp.where(counts, reorder(x, order.back_BT), 0) for x in found)
    return loss, entropy


def _forward(chunk: int, divergence: str, primals: _Inputs) -> Any:
    inputs = _Inputs(*(primal.value for primal in primals))
    wanted = Wanted(primals.hidden.perturbed, primals.head.perturbed)
    return _distill(chunk, divergence, inputs), (inputs, wanted)


def _backward(chunk: int, divergence: str, saved: Any, cotangents: Any) -> Any:
    if isinstance(cotangents[0], SymbolicZero):
        return (None,)
    inputs, wanted = saved
    hidden, head, weights = inputs.hidden, inputs.head, inputs.weights
    chunk, order, parts = _walk(chunk, divergence, inputs)
    g_BT = jnp.where(weights != 0, cotangents[0] / inputs.temperature, 0)
    g_BP = arrange(g_BT, order, chunk)

    def error(i: Array) -> Array:
        _, (_, slope) = parts(i)
        return cut(g_BP, i, chunk)[..., None] * slope

    dhidden, dhead = gradients(hidden, head, order, chunk, wanted, error)
    return (_Inputs(dhidden, dhead, None, None, None, None, None),)


_distill.defvjp(_forward, _backward, symbolic_zeros=True)


def _walk(chunk: int, divergence: str, inputs: _Inputs) -> Any:
    """(chunk, order, parts) of a walk over both models.

    parts(i) gives the student's log-probabilities in chunk i, and the divergence there
    with its slope.
    """
    chunk = min(chunk, inputs.weights.shape[1])
    order = weighted_first(inputs.weights, chunk)
    models = (inputs[:2], inputs[2:4])
    rows = [arrange(hidden, order, chunk) for hidden, _ in models]
    matrices = [head.astype(hidden.dtype) for hidden, head in models]

    def parts(i: Array) -> Any:
        s, t = (
            jax.nn.log_softmax(
                head_logits(cut(row, i, chunk), matrix) / inputs.temperature
            )
            for row, matrix in zip(rows, matrices, strict=True)
        )
        return s, DIVERGENCES[divergence](s, t, inputs.beta)

    return chunk, order, parts
