"""A projection's product, with its gradients written out.

What JAX derives is right, but it leaves the order of each product to XLA, whose CPU
backend then transposes the larger operand, a pass over memory that costs more than the
product. Here the smaller one is transposed, and a low-rank update gets its gradients by
way of the rank: the full gradient of a frozen weight is never made.

A weight may be quantized. What the backward pass finds of it is then its codes, and it
is made dense once more: a dense copy lives as long as one product.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ftjax.quant.qtensor import QTensor

Array = jax.Array
Weight = Array | QTensor

KEPT = "kept"


def keep(x: Array) -> Array:
    """Marks what the backward pass is to find, where the rest is computed again."""
    return checkpoint_name(x, KEPT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(eqn: str, x: Array, w: Weight) -> Array:
    """`einsum(eqn, x, w)`, such as 'BTD,DNH->BTNH'.

    Args:
      eqn: x ends with the inputs; w names its inputs first, then its outputs.
      x: [..., *inputs].
      w: [*inputs, *outputs]; its gradient is not computed where nobody wants it, and
        there is none of a quantized one.
    """
    return jnp.einsum(eqn, x, dense(w, x.dtype))


def dense(w: Weight, dtype: Any) -> Array:
    """A weight in the dtype of the computation, whatever it is stored as."""
    return w.dense(dtype) if isinstance(w, QTensor) else w.astype(dtype)


def _value(arg: Any) -> Any:
    """What a differentiation rule was called with: an array, or a tree of them."""
    return jax.tree.map(lambda leaf: leaf.value, arg, is_leaf=_is_primal)


def _perturbed(arg: Any) -> bool:
    return any(x.perturbed for x in jax.tree.leaves(arg, is_leaf=_is_primal))


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _project_forward(eqn: str, x: Any, w: Any) -> tuple[Array, Any]:
    value = _value(w)
    saved = x.value if _perturbed(w) else None, value if x.perturbed else None
    return project(eqn, x.value, value), saved


def _project_backward(eqn: str, saved: Any, dy: Any) -> tuple[Any, Any]:
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return None, None
    x, w = saved
    dx = None if w is None else jnp.einsum(_to_inputs(eqn), dy, dense(w, dy.dtype))
    return dx, None if x is None else _to_weight(eqn, x, dy)


project.defvjp(_project_forward, _project_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def project_updated(
    eqn: str,
    x: Array,
    w: Weight,
    a: Array,
    b: Array,
    scale: Array,
    gain: Array | None = None,
) -> Array:
    """`einsum(eqn, x, gain * (w + scale * a.b))`: LoRA as one product instead of three.

    Beside `x.w` there are no passes over the outputs for the update. With many tokens
    that saves more than adding a.b to the weight costs, in either pass. The backward
    pass finds the result again where there is a gain: its gradient is dy.y / gain.

    Args:
      eqn: as in `project`.
      x: [..., *inputs].
      w: [*inputs, *outputs], in a precision in which small updates are not lost.
      a: [*inputs, rank].
      b: [rank, *outputs].
      scale: [], a constant.
      gain: [*outputs], 1 if None; where it is 0 its gradient is too.
    """
    return jnp.einsum(eqn, x, _updated(w, a, b, scale, gain))


def _updated_forward(eqn: str, *args: Any) -> tuple[Array, Any]:
    values = tuple(_value(arg) for arg in args)
    y = keep(project_updated(eqn, *values))
    # A key of the tree and not a value: it must be known when tracing.
    wanted = {"to_weight": ()} if _perturbed(args[1]) else {}
    return y, (values, None if values[-1] is None else y, wanted)


def _updated_backward(eqn: str, saved: Any, dy: Any) -> Any:
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return (None,) * 6
    (x, w, a, b, scale, gain), y, wanted = saved
    dx = jnp.einsum(_to_inputs(eqn), dy, _updated(w, a, b, scale, gain))
    rank = a.shape[-1]
    x_TI, dy_TO = _matrix(x, a.ndim - 1), _matrix(dy, b.ndim - 1)
    b_rO = _times(b, gain).reshape(rank, -1)
    h_Tr, dh_Tr = x_TI @ a.reshape(-1, rank) * scale, dy_TO @ b_rO.T * scale
    da, db = _over_tokens(x_TI, dh_Tr), _over_tokens(h_Tr, dy_TO)
    dw = _times(_to_weight(eqn, x, dy), gain) if wanted else None
    dgain = None
    if gain is not None:
        dgain = jnp.sum(dy_TO * _matrix(y, b.ndim - 1), axis=0).reshape(gain.shape)
        dgain = dgain / jnp.where(gain == 0, 1, gain)
    return dx, dw, da.reshape(a.shape), _times(db.reshape(b.shape), gain), None, dgain


project_updated.defvjp(_updated_forward, _updated_backward, symbolic_zeros=True)


def _updated(w: Weight, a: Array, b: Array, scale: Array, gain: Array | None) -> Array:
    rank = a.shape[-1]
    update = (a.reshape(-1, rank) @ b.reshape(rank, -1)).reshape(w.shape)
    return _times(dense(w, a.dtype) + scale * update, gain)


def _times(x: Array, gain: Array | None) -> Array:
    """x [..., *outputs] times a gain [*outputs]."""
    if gain is None:
        return x
    return x * jnp.expand_dims(gain, tuple(range(x.ndim - gain.ndim)))


def updated_norms(w: Weight, a: Array, b: Array, scale: Array, dtype: Any) -> Array:
    """The norm over the inputs of w + scale * a.b: float32 [*outputs], a constant.

    |w|^2 + 2 scale w.(a.b) + scale^2 |a.b|^2, by way of the rank: nothing of the
    weight's size is made but itself in `dtype`, which the product with it needs too.
    """
    w, a, b, scale = jax.lax.stop_gradient((w, a, b, scale))
    rank = a.shape[-1]
    a_Ir, b_rO = a.reshape(-1, rank), b.reshape(rank, -1).astype(jnp.float32)
    w_IO = dense(w, dtype).reshape(a_Ir.shape[0], -1)
    inner_rO, gram_rr = (
        jnp.einsum(
            "Ir,IO->rO", a_Ir.astype(x.dtype), x, preferred_element_type=jnp.float32
        )
        for x in (w_IO, a_Ir)
    )
    square_O = jnp.sum(jnp.square(w_IO.astype(jnp.float32)), axis=0)
    cross_rO = scale * (2 * inner_rO + scale * (gram_rr @ b_rO))
    square_O = square_O + jnp.sum(b_rO * cross_rO, axis=0)
    return jnp.sqrt(jnp.maximum(square_O, 0)).reshape(b.shape[1:])


@jax.custom_vjp
def scaled(x: Array, factor: Array) -> Array:
    """x [..., *last] times float32 [*last], in float32: bfloat16 rounds 1.001 to 1.

    The backward pass finds x in its own dtype.
    """
    return _times(x.astype(jnp.float32), factor).astype(x.dtype)


def _scaled_forward(x: Array, factor: Array) -> tuple[Array, Any]:
    return scaled(x, factor), (x, factor)


def _scaled_backward(saved: Any, dy: Array) -> tuple[Array, Array]:
    x, factor = saved
    both = dy.astype(jnp.float32) * x.astype(jnp.float32)
    return scaled(dy, factor), jnp.sum(both, tuple(range(x.ndim - factor.ndim)))


scaled.defvjp(_scaled_forward, _scaled_backward)


def _to_inputs(eqn: str) -> str:
    x, w, y = eqn.replace("->", ",").split(",")
    return f"{y},{w}->{x}"


def _to_weight(eqn: str, x: Array, dy: Array) -> Array:
    """The gradient of the weight: [*inputs, *outputs]."""
    names, w, _ = eqn.replace("->", ",").split(",")
    inputs = sum(c in names for c in w)
    outputs = len(w) - inputs
    dw_IO = _over_tokens(_matrix(x, inputs), _matrix(dy, outputs))
    return dw_IO.reshape(*x.shape[x.ndim - inputs :], *dy.shape[dy.ndim - outputs :])


def _matrix(x: Array, last: int) -> Array:
    """[tokens, features], of an array whose `last` axes are the features."""
    return x.reshape(-1, math.prod(x.shape[x.ndim - last :]))


def _over_tokens(x_TI: Array, y_TO: Array) -> Array:
    """x^T y, with the narrower of the two transposed: [I, O]."""
    if x_TI.shape[1] <= y_TO.shape[1]:
        return settled(x_TI.T) @ y_TO
    return settled(settled(y_TO.T) @ x_TI).T


def settled(x: Array) -> Array:
    """Keeps XLA's CPU from folding a transpose into a product that is slow that way.

    Elsewhere products take their operands as they lie.
    """
    if jax.default_backend() != "cpu":
        return x
    return jax.lax.optimization_barrier(x)
