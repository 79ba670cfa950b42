"""The site: where a frozen weight and its update meet.

`Proj` is the only module with a matmul weight. Whatever works on weights (LoRA,
merging, sharding, export) is a loop over `find_sites(model)` and knows no model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ftjax.gradients import Weight, keep, project, scaled
from ftjax.models.vera import Pair, Vera, with_pair
from ftjax.weights import Array, Delta, Stack

Path = tuple[str, ...]

HEAD = ("lm_head",)
INPUTS, OUTPUTS = "inputs", "outputs"  # the sides of a projection
FOLD = 64  # tokens from which one product with the updated weight is the quicker way


class Proj(nn.Module):
    """`einsum(eqn, x, w)`, plus the low-rank update if there is one, plus a bias.

    Reads `quant/.../w` where that collection has a `QTensor`, else `params/.../w`, and
    adds `lora/.../w` where that collection has a `Delta`, or a `Stack` of them, or
    `vera/.../w`, with the pair that it is called with.
    A `Delta` with a magnitude multiplies the sum by its gain, but not the bias.
    Multiplies its inputs or its outputs by `ia3/.../inputs` or `ia3/.../outputs`,
    where there is such a vector.

    Attributes:
      eqn: such as 'BTD,DNH->BTNH'; w names its inputs first, then its outputs.
      shape: of w.
      axes: logical axes of w, for the sharding rules.
      bias: adds `params/.../b`, of the outputs' shape.
    """

    eqn: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    bias: bool = False

    def setup(self) -> None:
        inputs = site_inputs(self.eqn)
        fan = nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", range(inputs), range(inputs, len(self.shape))
        )
        self.w: Weight
        if self.has_variable("quant", "w"):
            self.w = self.get_variable("quant", "w")
        else:
            self.w = self.param("w", nn.with_partitioning(fan, self.axes), self.shape)
        if self.bias:
            zeros = nn.with_partitioning(nn.initializers.zeros, self.axes[inputs:])
            self.b = self.param("b", zeros, self.shape[inputs:])

    def __call__(self, x: Array, pair: Pair | None = None) -> Array:
        y = self._product(self._scaled(x, INPUTS), self._update(pair))
        if self.bias:
            b = self.b.astype(x.dtype)
            y = y + jnp.expand_dims(b, tuple(range(y.ndim - b.ndim)))
        return self._scaled(y, OUTPUTS)

    def _product(self, x: Array, delta: Delta | Stack | None) -> Array:
        """x times the weight and its update; the backward pass finds it again."""
        if delta is None:
            return keep(project(self.eqn, x, self.w))
        seen = x  # by the update
        if isinstance(delta, Delta) and delta.dropout > 0 and self.has_rng("dropout"):
            seen = delta.drop(x, self.make_rng("dropout"))
        gain = delta.gain(self.w, x.dtype)
        if gain is None and seen is not x:
            return keep(project(self.eqn, x, self.w) + delta(self.eqn, seen))
        tokens = x.size // math.prod(self.shape[: site_inputs(self.eqn)])
        if x.dtype == jnp.float32 and tokens >= FOLD:
            y = delta.folded(self.eqn, seen, self.w, gain)
        else:
            y = keep(project(self.eqn, seen, self.w) + delta(self.eqn, seen))
            y = y if gain is None else scaled(y, gain)
        if seen is not x:
            # As in PEFT: what dropout has changed is not the magnitude's.
            y = y + keep(project(self.eqn, x - seen, self.w))
        return y

    def _update(self, pair: Pair | None) -> Delta | Stack | None:
        """The low-rank update of the weight."""
        vera: Vera | None = self.get_variable("vera", "w")
        if vera is not None and pair is not None:
            return with_pair(vera, pair).delta()
        return self.get_variable("lora", "w")

    def _scaled(self, x: Array, side: str) -> Array:
        """x times the vector of a side, if there is one."""
        factor = self.get_variable("ia3", side)
        return x if factor is None else scaled(x, factor.astype(jnp.float32))


def site_inputs(eqn: str) -> int:
    """How many leading axes of the weight are contracted.

    >>> site_inputs('BTNH,NHD->BTD')
    2
    """
    x, w, _ = eqn.replace("->", ",").split(",")
    return sum(c in x for c in w)


@dataclass(frozen=True)
class Site:
    """One projection: its equation, per-layer shape, logical axes and layer count.

    `layers` is None where the weight is not stacked.
    """

    path: Path
    eqn: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    layers: int | None

    @property
    def inputs(self) -> tuple[int, ...]:
        return self.shape[: site_inputs(self.eqn)]

    @property
    def outputs(self) -> tuple[int, ...]:
        return self.shape[site_inputs(self.eqn) :]


def site_names(site: Site) -> list[str]:
    """The Hugging Face module names of a site, one per layer."""
    if site.layers is None:
        return [".".join(site.path)]
    head, *rest = site.path
    return [f"model.{head}.{i}." + ".".join(rest) for i in range(site.layers)]


@lru_cache(maxsize=8)
def find_sites(model: nn.Module) -> Mapping[Path, Site]:
    """Every projection of a model, traced from shapes alone: {path: Site}."""
    found: dict[Path, Proj] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Proj):
            found[context.module.path] = context.module
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        params = abstract_params(model)
    sites = {}
    for path, proj in found.items():
        leaf: Any = params
        for name in path:
            leaf = leaf[name]
        stacked = len(leaf["w"].shape) > len(proj.shape)
        layers = leaf["w"].shape[0] if stacked else None
        sites[path] = Site(path, proj.eqn, proj.shape, proj.axes, layers)
    return sites


def abstract_params(model: nn.Module) -> Any:
    """The shapes of a model's `params`, without their logical axes."""
    return nn.unbox(boxed_params(model))


def params_axes(model: nn.Module) -> Any:
    """The logical axes of a model's `params`: a tree of tuples."""
    return jax.tree.map(
        lambda box: tuple(box.names),
        boxed_params(model),
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )


def init_params(model: nn.Module, key: Array) -> Any:
    """Fresh weights, without their logical axes."""
    return nn.unbox(_init(model, key))


def boxed_params(model: nn.Module) -> Any:
    """The shapes of a model's `params`, each boxed with its logical axes."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(partial(_init, model), key)


def _init(model: nn.Module, key: Array) -> Any:
    token = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, token, token, token, method="logits")["params"]


def put(tree: dict[str, Any], path: Path, value: Any) -> None:
    """Sets a value in a nested dict."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def find(tree: Any, path: Path) -> Any:
    """What a collection has at a site; None if nothing."""
    for name in (*path, "w"):
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree
