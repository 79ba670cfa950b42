"""Leaves beside plain arrays, and how trained and frozen trees come together."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ftjax.gradients import Weight, project, project_updated, updated_norms

Array = jax.Array


@flax.struct.dataclass
class Delta:
    """A low-rank update of a weight: w + scale * a.b (LoRA, arXiv 2106.09685).

    With a magnitude it is m / n * (w + scale * a.b), where n is the norm over the
    inputs of what it is multiplied with, a constant to the gradient (DoRA, arXiv
    2402.09353, section 4.3): a.b turns each output's vector, m is its length.

    Shapes are those of one layer; a stack of layers adds a leading axis to each leaf.
    A layer of smaller rank is padded with zeros, which stay zero: the gradient of a
    zero column of `a` is a multiple of the zero row of `b`, and the other way round.
    A layer without an update has scale 0, and no use for its magnitude.
    """

    a: Array  # [*inputs, rank]
    b: Array  # [rank, *outputs]
    scale: Array  # [], alpha / rank; a leaf so that runs may vary it; never trained
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    m: Array | None = None  # [*outputs]
    n: Array | None = None  # float32 [*outputs], where it is known beforehand

    def __call__(self, eqn: str, x: Array) -> Array:
        """`scale * einsum(eqn, x, a.b)`, by way of the rank, in x's dtype.

        Args:
          eqn: the projection's equation, such as 'BTD,DNH->BTNH'.
          x: [..., *inputs].
        """
        down, up = low_rank(eqn)
        scale = jax.lax.stop_gradient(self.scale).astype(x.dtype)
        h = jnp.einsum(down, x, self.a.astype(x.dtype)) * scale
        return jnp.einsum(up, h, self.b.astype(x.dtype))

    def drop(self, x: Array, key: Array) -> Array:
        """x with a share `dropout` of its numbers zero, and the others larger."""
        keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
        return jnp.where(keep, x / jnp.asarray(1 - self.dropout, x.dtype), 0)

    def folded(self, eqn: str, x: Array, w: Weight, gain: Array | None = None) -> Array:
        """`einsum(eqn, x, gain * (w + scale * a.b))`, quicker than two products.

        For float32 and many tokens: in a lower precision the sum of the weights would
        round a small update away.
        """
        a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
        return project_updated(eqn, x, w, a, b, self.scale, gain)

    def gain(self, w: Weight, dtype: Any) -> Array | None:
        """m / n of one layer, float32 [*outputs]; None without a magnitude."""
        if self.m is None:
            return None
        return self._gain(self.norms(w, dtype) if self.n is None else self.n)

    def norms(self, w: Weight, dtype: Any = jnp.float32) -> Array:
        """n of one layer: the norm over the inputs of w + scale * a.b.

        It is computed in every step: a look at each weight, against the many of the
        products. `dtype` is that of the computation.
        """
        return updated_norms(w, self.a, self.b, self.scale, dtype)

    def _gain(self, n: Array) -> Array | None:
        """m / n, and 1 where a layer has no update."""
        if self.m is None:
            return None
        n, scale = jax.lax.stop_gradient((n, self.scale))
        scale = jnp.expand_dims(scale, tuple(range(scale.ndim, n.ndim)))
        ratio = self.m.astype(jnp.float32) / jnp.where(n > 0, n, 1)
        return jnp.where(scale == 0, jnp.ones((), jnp.float32), ratio)

    def applied(self, w: Array) -> Array:
        """The weight with its update, float32: [*stack, *inputs, *outputs]."""
        whole = w.astype(jnp.float32) + self.dense()
        stack, inputs = self.scale.ndim, self.a.ndim - 1
        axes = tuple(range(stack, inputs))
        gain = self._gain(jnp.sqrt(jnp.sum(whole * whole, axes)))
        return whole if gain is None else whole * jnp.expand_dims(gain, axes)

    def dense(self) -> Array:
        """The low-rank part as a full weight, float32: [*stack, *inputs, *outputs]."""
        stack = self.scale.shape
        a = self.a.reshape(*stack, -1, self.a.shape[-1]).astype(jnp.float32)
        b = self.b.reshape(*stack, self.b.shape[len(stack)], -1).astype(jnp.float32)
        scale = self.scale.reshape(*stack, 1, 1)
        inputs, outputs = self.a.shape[len(stack) : -1], self.b.shape[len(stack) + 1 :]
        return (scale * (a @ b)).reshape(*stack, *inputs, *outputs)


ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}


@flax.struct.dataclass
class Hidden:
    """A small hidden layer with a residual around it: y + up(activation(down(y))).

    Shapes are those of one layer; a stack of layers adds a leading axis to each leaf.
    """

    down: Array  # [D, size]
    down_bias: Array  # [size]
    up: Array  # [size, D]
    up_bias: Array  # [D]
    activation: str = flax.struct.field(pytree_node=False, default="gelu")

    def __call__(self, y_BTD: Array) -> Array:
        down, down_bias, up, up_bias = (
            leaf.astype(y_BTD.dtype)
            for leaf in (self.down, self.down_bias, self.up, self.up_bias)
        )
        h = jnp.einsum("BTD,DF->BTF", y_BTD, down) + down_bias[None, None]
        h = ACTIVATIONS[self.activation](h)
        return y_BTD + jnp.einsum("BTF,FD->BTD", h, up) + up_bias[None, None]


def low_rank(eqn: str) -> tuple[str, str]:
    """The two halves of a projection through a rank axis `r`.

    >>> low_rank('BTD,DNH->BTNH')
    ('BTD,Dr->BTr', 'BTr,rNH->BTNH')
    """
    x, w, y = eqn.replace("->", ",").split(",")
    w_in = "".join(c for c in w if c in x)
    w_out = "".join(c for c in w if c not in x)
    low = "".join(c for c in x if c not in w) + "r"
    return f"{x},{w_in}r->{low}", f"{low},r{w_out}->{y}"


@flax.struct.dataclass
class Stack:
    """Several updates of one weight side by side; each row of a batch chooses its own.

    The ranks of all of them are concatenated, and a choice is a row of factors, one per
    rank: 1 for the columns of its update and 0 for the others (a sum has several). All
    rows share two products, as in one update of the summed rank. Shapes are those of
    one layer, as in `Delta`.
    """

    a: Array  # [*inputs, R]
    b: Array  # [R, *outputs]
    factors: Array  # [K, R], what each choice multiplies each rank by
    index: Array | None = None  # int32 [B], each row's choice

    @property
    def dropout(self) -> float:
        return 0.0

    def gain(self, w: Weight, dtype: Any) -> None:
        """There is no magnitude: see `several`."""

    def __call__(self, eqn: str, x: Array) -> Array:
        """Row i: `einsum(eqn, x, (a * factors[index[i]]).b)`, in x's dtype.

        Args:
          eqn: the projection's equation; rows are the first axis of x.
          x: [B, ..., *inputs].
        """
        if self.index is None:
            raise ValueError("rows have not chosen: see `choose`")
        down, up = low_rank(eqn)
        h = jnp.einsum(down, x, self.a.astype(x.dtype))
        factors_BR = jnp.take(self.factors, self.index, axis=0).astype(x.dtype)
        between = range(1, h.ndim - 1)
        factors = jnp.expand_dims(factors_BR, tuple(between))
        # Not a product alone: what another's update overflows to must not reach a row.
        h = jnp.where(factors == 0, jnp.zeros((), x.dtype), h * factors)
        return jnp.einsum(up, h, self.b.astype(x.dtype))

    def folded(self, eqn: str, x: Array, w: Weight, gain: Array | None = None) -> Array:
        """As `Delta.folded`; there is no one weight to fold into, so two products."""
        return project(eqn, x, w) + self(eqn, x)


def choose(tree: Any, index: Sequence[int] | Array) -> Any:
    """The variables, with row i of a batch using choice `index[i]` of every stack."""
    index_B = jnp.asarray(index, jnp.int32)

    def chosen(leaf: Any) -> Any:
        if not isinstance(leaf, Stack):
            return leaf
        layers = leaf.factors.shape[:-2]
        spread = jnp.broadcast_to(index_B, (*layers, *index_B.shape))
        return dataclasses.replace(leaf, index=spread)

    return jax.tree.map(chosen, tree, is_leaf=is_stack)


def is_stack(leaf: Any) -> bool:
    return isinstance(leaf, Stack)


def join(frozen: Any, trained: Any) -> Any:
    """The variables of the policy: trained leaves beside frozen ones, or over them.

    A stack of which only the last layers are trained is put together again, in the
    dtype of the frozen ones.
    """
    if isinstance(frozen, dict) and isinstance(trained, dict):
        both = {k: join(frozen[k], trained[k]) for k in frozen.keys() & trained.keys()}
        return {**frozen, **trained, **both}
    return jnp.concatenate([frozen, trained.astype(frozen.dtype)])
