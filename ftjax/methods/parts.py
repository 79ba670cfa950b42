"""What every method is made of: its trained parts, its start, its rows of the table."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftjax.methods.lora import LoraPlan

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
      lora: ranks and scales, where a low-rank update is all that is trained.
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


def master(weight: jax.Array) -> jax.Array:
    """What is trained is kept in float32: small updates add up there."""
    return weight.astype(jnp.float32)
