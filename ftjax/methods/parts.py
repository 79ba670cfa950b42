"""What every method is made of: its trained parts, its start, its rows of the table."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftjax.methods.lora import LoraPlan
from ftjax.methods.quant import Plan
from ftjax.methods.residual import Beginning

PyTree = Any
Init = Callable[[PyTree, int], PyTree]  # (base, seed) -> what is trained
Rest = Callable[[PyTree], PyTree]  # base -> what of it stays frozen
Begin = Callable[[Plan, Plan], Beginning]  # (formats, those that are stored so)


def everything(base: PyTree) -> PyTree:
    """The `rest` of a method that trains nothing of the base."""
    return base


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
    """One trained collection by its shapes, the dtypes of storage, and its axes."""

    shapes: PyTree
    axes: PyTree


@dataclass(frozen=True)
class Method:
    """A method on a model, by shape alone.

    Attributes:
      name: as in the config.
      parts: every trained collection; a part of `params` has the paths of the whole.
      init: (base, seed) -> what is trained, a dict of collections. The base is
        {'params': ...}, and 'quant' where some of it is quantized.
      rest: base -> what of it stays frozen; no array is in both.
      rows: of the table of what is trained, without the sum.
      lora: ranks and scales of a low-rank update.
      beside: frozen collections that are no part of the base; `rest` makes them.
      whole: every weight of the base is trained, so that a checkpoint needs no base.
      frozen_is_base: what stays frozen, alone, is the base that the run began from
        (where that is quantized, its plain quantization), so that it can be a
        reference. Not where the base is trained or was taken apart.
      begin: of an update that is made of the weights while they are read.
    """

    name: str
    parts: dict[str, Part]
    init: Init
    rest: Rest = everything
    rows: list[Row] = field(default_factory=list)
    lora: LoraPlan | None = None
    whole: bool = False
    beside: dict[str, Part] = field(default_factory=dict)
    frozen_is_base: bool = True
    begin: Begin | None = None

    def start(self, base: PyTree, seed: int) -> tuple[PyTree, PyTree]:
        """(trained, frozen) at the start of a run."""
        return self.stored(self.init(base, seed)), self.rest(base)

    def stored(self, trained: PyTree) -> PyTree:
        """What is trained, in the dtypes that it is stored in."""
        shapes = {name: part.shapes for name, part in self.parts.items()}
        return jax.tree.map(lambda x, s: x.astype(s.dtype), trained, shapes)

    @property
    def count(self) -> int:
        """Trained parameters; what only fills up a smaller rank is not one."""
        if self.rows:
            return sum(row.trained for row in self.rows)
        shapes = jax.tree.leaves([part.shapes for part in self.parts.values()])
        return sum(math.prod(leaf.shape) for leaf in shapes)


def in_dtype(method: Method, dtype: str) -> Method:
    """The method with all that is new in it stored, and updated, in a dtype.

    A scale is not trained, and stays what it is.
    """

    def shape(path: Any, leaf: Any) -> Any:
        fixed = getattr(path[-1], "name", "") == "scale"
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if fixed else dtype)

    parts = {
        name: replace(part, shapes=jax.tree_util.tree_map_with_path(shape, part.shapes))
        for name, part in method.parts.items()
    }
    return replace(method, parts=parts)


def master(weight: jax.Array) -> jax.Array:
    """What is trained is kept in float32: small updates add up there."""
    return weight.astype(jnp.float32)
