"""A scalar head: one number per position, trained beside whatever a method trains."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.methods.parts import Method, Part, PyTree, Row
from ftjax.weights import Array

SCORE = "score"  # the collection of a reward model; transformers' name of its head


def with_head(method: Method, d_model: int, name: str) -> Method:
    """The method, and a head `name` (a collection of its own): {'w': float32 [D]}.

    It begins at zero, so that every reward is 0 and no preference is built in.
    transformers draws it at random.
    """
    part = head_part(d_model)

    def init(base: PyTree, seed: int) -> PyTree:
        head = {"w": jnp.zeros((d_model,), jnp.float32)}
        return {**method.init(base, seed), name: head}

    rows = [*method.rows, Row(name, f"{d_model} x 1", "", 0, d_model, 100.0)]
    return replace(
        method,
        parts={**method.parts, name: part},
        init=init,
        rows=rows if method.rows else [],
    )


def head_part(d_model: int) -> Part:
    """The shape and the axes of a head."""
    return Part({"w": jax.ShapeDtypeStruct((d_model,), jnp.float32)}, {"w": ("embed",)})


def read_head(hidden_BTD: Array, head: Any) -> Array:
    """The number of each position, in float32: [B, T]."""
    return jnp.einsum("BTD,D->BT", hidden_BTD.astype(jnp.float32), head["w"])
