"""The memory that a run will take, from shapes alone: nothing is read or compiled.

Weights, gradients and optimizer states are exact; activations are an upper estimate of
what the backward pass keeps, by remat policy. Sizes are bytes per device.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax.methods.quant import abstract_quant, quant_axes, without
from ftjax.methods.virtual import virtual_count
from ftjax.models.proj import abstract_params, find_sites, params_axes
from ftjax.models.spec import ModelSpec
from ftjax.optim import make_optimizer
from ftjax.prepare import Shape
from ftjax.sharding import shard_tree


def estimate(config: Any, shape: Shape, length: int, mesh: Mesh) -> dict[str, int]:
    """Bytes per device of each part of a training step, and their `total`.

    Args:
      config: of the run.
      shape: the model and its method.
      length: T, tokens per row.
      mesh: the devices.
    """
    method = shape.method
    trained = {name: part.shapes for name, part in method.parts.items()}
    trained_axes = {name: part.axes for name, part in method.parts.items()}
    masters = _bytes(trained, trained_axes, mesh, 4)
    optimizer = _optimizer(config.optim, shape, trained, trained_axes, mesh)
    # A second point, where the gradient is taken, beside the average.
    points = 2 if config.optim.name == "schedule_free" else 1
    rows = config.train.batch_size // config.train.accumulate
    tokens = math.ceil(rows / mesh.size) * (length + virtual_count(method))
    item = jnp.dtype(shape.dtype).itemsize
    sizes = {
        "frozen weights": 0 if method.whole else _frozen(shape, mesh),
        "trained weights": masters * points,
        "gradients": masters * (2 if config.train.accumulate > 1 else 1),
        "optimizer": optimizer,
        "activations": tokens * item * kept_per_token(shape.model.spec, config),
        "a layer at work": tokens * item * _layer(shape.model.spec)["none"],
        "head, a chunk at a time": _head(config, shape, rows / mesh.size, length),
    }
    if "rollout" in config:
        sizes["answering: weights and cache"] = _answering(config, shape, length)
    return {**sizes, "total": sum(sizes.values())}


def _answering(config: Any, shape: Shape, length: int) -> int:
    """Bytes of the weights taken apart for generation, and of its cache."""
    spec, item = shape.model.spec, jnp.dtype(shape.dtype).itemsize
    weights = sum(leaf.size for leaf in jax.tree.leaves(shape.params)) * item
    rows = config.train.batch_size * config.rollout.batches
    cached = 2 * spec.n_layers * spec.n_kv_heads * spec.head_dim
    return weights + rows * length * cached * item


def _optimizer(optim: Any, shape: Shape, trained: Any, axes: Any, mesh: Mesh) -> int:
    """Bytes of the optimizer's state, as it is made.

    What has the shape of a weight is split as that weight is; the rest (scales of
    codes, rows and columns of a factored moment, counters) is whole on every device.
    """
    shardings = jax.tree.leaves_with_path(shard_tree(trained, axes, mesh))
    places = {tuple(map(str, path)): place for path, place in shardings}
    shapes = {
        tuple(map(str, path)): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(trained)
    }
    tx = make_optimizer(optim, 1, shape.matrices)
    total = 0
    for path, leaf in jax.tree.leaves_with_path(jax.eval_shape(tx.init, trained)):
        keys = tuple(map(str, path))
        tails = (keys[i:j] for i in range(len(keys)) for j in (len(keys), -1))
        weight = next((t for t in tails if shapes.get(t) == leaf.shape), None)
        local = places[weight].shard_shape(leaf.shape) if weight else leaf.shape
        total += math.prod(local) * leaf.dtype.itemsize
    return total


def _frozen(shape: Shape, mesh: Mesh) -> int:
    """Bytes of the float weights, and of codes and scales."""
    formats, model = shape.formats, shape.model
    floats = (
        without(abstract_params(model), formats),
        without(params_axes(model), formats),
    )
    item = shape.param_dtype.itemsize
    total = _bytes(*floats, mesh, item)
    part = shape.method.parts.get("params")
    if part is not None:  # these are trained, and counted there
        total -= _bytes(part.shapes, part.axes, mesh, item)
    for beside in shape.method.beside.values():
        total += _bytes(beside.shapes, beside.axes, mesh, 4)
    if formats:
        sites = find_sites(shape.model)
        quant = abstract_quant(sites, formats), quant_axes(sites, formats)
        total += _bytes(*quant, mesh)
    return total


def _layer(spec: ModelSpec) -> dict[str, int]:
    """Numbers per token that a layer keeps for the backward pass, by remat policy."""
    query, key = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    return {
        # the input of the layer
        "full": spec.d_model,
        # and the results of the projections and of the attention
        "dots": 3 * spec.d_model + 2 * query + 2 * key + 2 * spec.d_ff,
        # and norms, rotated queries and keys, and the gated product
        "none": 6 * spec.d_model + 4 * query + 4 * key + 4 * spec.d_ff,
    }


def kept_per_token(spec: ModelSpec, config: Any) -> int:
    """Numbers per token that all layers keep."""
    layer = _layer(spec)[config.model.remat]
    rank = config.method.rank * 7 if config.method.name in ("lora", "vera") else 0
    kept = layer + (0 if config.model.remat == "full" else rank)
    return spec.n_layers * kept + 4 * spec.d_model


def _head(config: Any, shape: Shape, rows: float, length: int) -> int:
    spec = shape.model.spec
    positions = math.ceil(rows) * min(config.loss.chunk, length)
    logits = 3 * positions * spec.vocab_size * 4  # logits, exponentials, error
    gradient = spec.d_model * spec.vocab_size * 4 if shape.method.whole else 0
    return logits + gradient


def _bytes(tree: Any, axes: Any, mesh: Mesh, itemsize: int | None = None) -> int:
    """Per device; each array in its own dtype, where no other size is given."""
    shardings = shard_tree(tree, axes, mesh)

    def local(x: Any, sharding: Any) -> int:
        numbers = math.prod(sharding.shard_shape(x.shape))
        return numbers * (itemsize or x.dtype.itemsize)

    return sum(jax.tree.leaves(jax.tree.map(local, tree, shardings)))
