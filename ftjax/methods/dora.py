"""DoRA: a weight's length is trained apart from its direction (arXiv 2402.09353).

What trains and computes is `Delta`; here are the magnitudes that it begins with.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.gradients import Weight
from ftjax.methods.lora import LoraPlan
from ftjax.models.proj import Path, find, put
from ftjax.weights import Array, Delta


def with_magnitudes(lora: Any, plan: LoraPlan, base: Any) -> Any:
    """The collection with m the norm of w + scale * a.b, so that nothing is rescaled.

    One layer's weight is dense at a time.

    Args:
      lora: at its start.
      plan: that it was made by.
      base: {'params': ...}, and 'quant' where some of it is quantized.
    """
    tree: dict[str, Any] = {}
    for path, at in plan.sites.items():
        delta = find(lora, path)
        if at.dora:
            m = _norms(delta, base_weight(base, path), at.site.layers is not None)
            delta = replace(delta, m=m)
        put(tree, path, {"w": delta})
    return tree


def base_weight(base: Any, path: Path) -> Weight:
    """The weight of a site, or its codes."""
    codes = find(base.get("quant", {}), path)
    return find(base["params"], path) if codes is None else codes


@partial(jax.jit, static_argnames="stacked")
def _norms(delta: Delta, w: Weight, stacked: bool) -> Array:
    """[*stack, *outputs]; 0 where a layer has no update."""

    def one(pair: tuple[Delta, Weight]) -> Array:
        delta, w = pair
        return jnp.where(delta.scale == 0, jnp.zeros(()), delta.norms(w))

    return jax.lax.map(one, (delta, w)) if stacked else one((delta, w))
