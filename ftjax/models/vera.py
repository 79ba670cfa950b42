"""VeRA's leaves: a low-rank update of two vectors and a pair that all sites share.

y += lambda_b * (B (lambda_d * (A x)))  (arXiv 2310.11454; PEFT's names)

The pair is as large as the largest site, and each takes its first rows and columns. It
stands once in the variables, at the root of the collection, and is handed down.
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ftjax.weights import Array, Delta

PAIR = "pair"  # its name in the collection


@flax.struct.dataclass
class Pair:
    """The frozen A and B, both with the rank between."""

    a: Array  # [I, rank], I the widest inputs
    b: Array  # [rank, O], O the widest outputs
    key: int = flax.struct.field(pytree_node=False, default=0)  # that drew them


@flax.struct.dataclass
class Vera:
    """What one site trains; with the pair it is a `Delta`.

    Shapes are those of one layer; a stack of layers adds a leading axis to each vector.
    A layer without an update is zero in both, and stays so.
    """

    lambda_d: Array  # [rank]
    lambda_b: Array  # [*outputs]
    inputs: tuple[int, ...] = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    pair: Pair | None = None

    def applied(self, w: Array) -> Array:
        """As `Delta`'s: the weight with its update, float32."""
        return self.delta().applied(w)

    def delta(self) -> Delta:
        """The update as LoRA has it: a = A * lambda_d, b = B * lambda_b, scale 1.

        The vectors go into the small matrices, so that nothing is kept of the wide
        activations beside what LoRA keeps.
        """
        if self.pair is None:
            raise ValueError("there is no pair: see `with_pair`")
        *stack, rank = self.lambda_d.shape
        outputs = self.lambda_b.shape[len(stack) :]
        inner = self.lambda_b.reshape(*stack, 1, -1)
        size = math.prod(self.inputs)
        lead = [1] * len(stack)
        a_IR = self.pair.a[:size].reshape(*lead, size, rank)
        b_RO = self.pair.b[:, : inner.shape[-1]].reshape(*lead, rank, -1)
        a = a_IR * self.lambda_d[..., None, :]
        b = b_RO * inner
        return Delta(
            a.reshape(*stack, *self.inputs, rank),
            b.reshape(*stack, rank, *outputs),
            jnp.ones(stack, jnp.float32),
            self.dropout,
        )


def with_pair(tree: Any, pair: Pair) -> Any:
    """The updates of a tree, each with the pair; no array is copied."""
    return jax.tree.map(
        lambda leaf: dataclasses.replace(leaf, pair=pair), tree, is_leaf=is_vera
    )


def whole(collection: Any) -> Any:
    """A `vera` collection, whose updates can be added to weights: without its root."""
    updates = {key: tree for key, tree in collection.items() if key != PAIR}
    return with_pair(updates, collection[PAIR])


def as_lora(collection: Any) -> Any:
    """A `vera` collection as the `lora` collection that computes the same."""
    return jax.tree.map(lambda leaf: leaf.delta(), whole(collection), is_leaf=is_vera)


def is_vera(leaf: Any) -> bool:
    return isinstance(leaf, Vera)
