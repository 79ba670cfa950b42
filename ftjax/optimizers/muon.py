"""Muon over the projections of a model, Adam over everything else.

optax has the iteration; what it must be told is which axes of a stacked weight make its
matrix. The factors `a` and `b` of LoRA are matrices of their own.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

# {module path: (leading axes that stack layers, axes that are inputs)}
Matrices = Mapping[tuple[str, ...], tuple[int, int]]

# The root mean square of an update, as of Adam's: one rate serves both (2502.16982).
RMS = 0.2


def scale_by_muon_or_adam(
    matrices: Matrices, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """Muon's direction for the weights of `matrices`, Adam's for the rest.

    Embeddings, the head, norms and biases go to Adam, as the method's author has it.
    `b1` is the momentum of both; `b2` and `eps` are Adam's.
    """

    def numbers(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: dimension_numbers(matrices, path, leaf), tree
        )

    def labels(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                "adam" if dimension_numbers(matrices, path, leaf) is None else "muon"
            ),
            tree,
        )

    muon = optax.chain(
        scale_by_muon(beta=b1, weight_dimension_numbers=numbers),
        optax.stateless(lambda updates, _: _with_rms(updates, numbers(updates))),
    )
    adam = optax.scale_by_adam(b1, b2, eps)
    return optax.partition({"muon": muon, "adam": adam}, labels)


def _with_rms(updates: Any, numbers: Any) -> Any:
    """Orthogonal matrices [in, out] have RMS 1 / sqrt(max(in, out)): makes it `RMS`."""

    def scaled(x: jax.Array, axes: MuonDimensionNumbers) -> jax.Array:
        fans = (axes.reduction_axis, axes.output_axis)
        return x * (
            RMS * math.sqrt(max(math.prod(x.shape[i] for i in f) for f in fans))
        )

    return jax.tree.map(scaled, updates, numbers)


def dimension_numbers(
    matrices: Matrices, path: Any, leaf: Any
) -> MuonDimensionNumbers | None:
    """The axes of a leaf that are its inputs and its outputs; None if no matrix.

    A leaf is {collection: {module path: {'w': weight, or `Delta` of `a` and `b`}}}.
    """
    names = tuple(str(getattr(k, "key", getattr(k, "name", ""))) for k in path)
    module, kind = names[1:], names[-1]
    if kind in ("a", "b") and names[-2:-1] == ("w",):
        module = module[:-1]
    if module[-1:] != ("w",) or module[:-1] not in matrices or kind == "scale":
        return None
    stack, inputs = matrices[module[:-1]]
    cut = {"w": stack + inputs, "a": leaf.ndim - 1, "b": stack + 1}[kind]
    return MuonDimensionNumbers(tuple(range(stack, cut)), tuple(range(cut, leaf.ndim)))
