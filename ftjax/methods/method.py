"""What a method trains: collections beside the base, or weights of the base itself.

method = plan_method(model, config.method)
trained, frozen = method.start(base, seed)        # no array is in both
model.apply(join(frozen, trained), ...)           # the policy
model.apply(frozen, ...)                          # the base, where it is whole
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftjax.methods.lora import LoraPlan, init_lora, lora_axes, plan_lora
from ftjax.models.decoder import Decoder
from ftjax.models.proj import Path, Site, abstract_params, find_sites, params_axes

PyTree = Any
Start = Callable[[PyTree, int], tuple[PyTree, PyTree]]  # (base, seed)


class Row(NamedTuple):
    """A line of the table of what is trained.

    `share` is the percentage of the weights that it updates, or stands beside.
    """

    target: str
    shape: str
    rank: str
    layers: int
    trained: int
    share: float


@dataclass(frozen=True)
class Part:
    """One trained collection by its shapes, float32, and their logical axes."""

    shapes: PyTree
    axes: PyTree


@dataclass(frozen=True)
class Method:
    """A method on a model, by shape alone.

    Attributes:
      name: as in the config.
      parts: every trained collection; a part of `params` has the paths of the whole.
      start: (base, seed) -> (trained, frozen), two dicts of collections. The base is
        {'params': ...}, and 'quant' where some of it is quantized.
      rows: of the table of what is trained, without the sum.
      lora: ranks and scales, where there is a low-rank update.
      whole: every weight of the base is trained, so that a checkpoint needs no base.
    """

    name: str
    parts: dict[str, Part]
    start: Start
    rows: list[Row] = field(default_factory=list)
    lora: LoraPlan | None = None
    whole: bool = False

    @property
    def count(self) -> int:
        """Trained parameters; what only fills up a smaller rank is not one."""
        if self.rows:
            return sum(row.trained for row in self.rows)
        shapes = jax.tree.leaves([part.shapes for part in self.parts.values()])
        return sum(math.prod(leaf.shape) for leaf in shapes)


def plan_method(model: Decoder, config: Any) -> Method:
    """The method of a config, `config.method`.

    Raises:
      UserError: a target without a match, a rank that does not fit.
    """
    return METHODS[config.name](model, find_sites(model), config)


def _full(model: Decoder, sites: Mapping[Path, Site], config: Any) -> Method:
    def start(base: PyTree, seed: int) -> tuple[PyTree, PyTree]:
        return jax.tree.map(master, base), {}

    part = Part(abstract_params(model), params_axes(model))
    return Method("full", {"params": part}, start, whole=True)


def _lora(model: Decoder, sites: Mapping[Path, Site], config: Any) -> Method:
    plan = plan_lora(sites, config)

    def start(base: PyTree, seed: int) -> tuple[PyTree, PyTree]:
        return {"lora": init_lora(plan, seed, config.init)}, base

    shapes = jax.eval_shape(lambda: init_lora(plan, 0))
    parts = {"lora": Part(shapes, lora_axes(plan))}
    return Method("lora", parts, start, _lora_rows(plan), plan)


METHODS: dict[str, Callable[[Decoder, Mapping[Path, Site], Any], Method]] = {
    "lora": _lora,
    "full": _full,
}


def _lora_rows(plan: LoraPlan) -> list[Row]:
    rows = []
    for path, at in plan.sites.items():
        inputs, outputs = math.prod(at.site.inputs), math.prod(at.site.outputs)
        layers = sum(rank > 0 for rank in at.ranks)
        ranks = "/".join(map(str, sorted({rank for rank in at.ranks if rank})))
        share = 100 * at.count / (layers * inputs * outputs)
        size = f"{inputs} x {outputs}"
        rows.append(Row(path[-1], size, ranks, layers, at.count, share))
    return rows


def master(weight: jax.Array) -> jax.Array:
    """What is trained is kept in float32: small updates add up there."""
    return weight.astype(jnp.float32)
