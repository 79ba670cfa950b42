"""Which collections a method trains, and which stay frozen."""

from typing import Any

import jax
import jax.numpy as jnp

METHODS = ("lora", "full")

PyTree = Any


def split(method: str, base: PyTree, lora: PyTree | None) -> tuple[PyTree, PyTree]:
    """(trained, frozen), two dicts of collections with no collection in common.

    Args:
      method: of METHODS.
      base: {'params': ...}, and 'quant' where some of its weights are quantized.
      lora: the collection; None for 'full'.

    What is trained is kept in float32, whatever the checkpoint's type: these are the
    masters that small updates add up in.
    """
    if method == "lora":
        return {"lora": lora}, base
    return jax.tree.map(lambda x: x.astype(jnp.float32), base), {}
