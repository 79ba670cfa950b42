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
    masters = _bytes(trained, trained_axes, mesh)
    gradients = _bytes(trained, trained_axes, mesh, 4)  # whatever the weights are
    optimizer = _optimizer(config.optim, shape, trained, trained_axes, mesh)
    # A second point, where the gradient is taken, beside the average.
    points = 2 if config.optim.name == "schedule_free" else 1
    rows = config.train.batch_size // config.train.accumulate
    tokens = math.ceil(rows / mesh.size) * (length + virtual_count(method))
    item = jnp.dtype(shape.dtype).itemsize
    sizes = {
        "frozen weights": 0 if method.whole else _frozen(shape, mesh),
        "trained weights": masters * points,
        "gradients": gradients * (2 if config.train.accumulate > 1 else 1),
        "optimizer": optimizer,
        "activations": tokens * item * kept_per_token(shape.model.spec, config),
        "a layer at work": tokens * item * _layer(shape.model.spec)["none"],
        "head, a chunk at a time": _head(config, shape, rows / mesh.size, length),
    }
    if getattr(config, "rollout", None) is not None:
        sizes["answering: weights and cache"] = _answering(config, shape, length)
    return {**sizes, "total": sum(sizes.values())}


def _answering(config: Any, shape: Shape, length: int) -> int:
    """Bytes of the weights taken apart for generation, and of its cache."""
    spec, item = shape.model.spec, jnp.dtype(shape.dtype).itemsize
    weights = sum(leaf.size for leaf in jax.tree.leaves(shape.params)) * item
    rows = config.train.batch_size * config.rollout.batches
    side_by_side = min(config.rollout.max_num_seqs or rows, rows)
    # A ring for each row, as long as prompt and answer, and the prompts that come in.
    slots = side_by_side * (2 * length - config.rollout.max_new_tokens)
    cached = 2 * spec.n_layers * spec.n_kv_heads * spec.head_dim
    return weights + slots * cached * item


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
    total = _bytes(_as_stored(floats[0], shape), floats[1], mesh)
    part = shape.method.parts.get("params")
    if part is not None:  # these are trained, and counted there
        total -= _bytes(_as_stored(part.shapes, shape), part.axes, mesh)
    for beside in shape.method.beside.values():
        total += _bytes(beside.shapes, beside.axes, mesh, 4)
    if formats:
        sites = find_sites(shape.model)
        quant = abstract_quant(sites, formats), quant_axes(sites, formats)
        total += _bytes(*quant, mesh)
    return total


def _as_stored(tree: Any, shape: Shape) -> Any:
    """Shapes of frozen weights, in the dtypes that they are stored in."""

    def stored(path: Any, leaf: Any) -> Any:
        dtype = shape.dtypes.get(tuple(key.key for key in path), shape.param_dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree_util.tree_map_with_path(stored, tree)


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


def _projected(spec: ModelSpec) -> int:
    """Numbers per token that come out of the projections: DoRA asks for them again."""
    heads = spec.n_heads + 2 * spec.n_kv_heads
    return heads * spec.head_dim + 2 * spec.d_model + 2 * spec.d_ff


def kept_per_token(spec: ModelSpec, config: Any) -> int:
    """Numbers per token that all layers keep."""
    layer = _layer(spec)[config.model.remat]
    remat, method = config.model.remat, config.method
    rank = method.rank * 7 if method.name in ("lora", "vera") else 0
    kept = layer + (0 if remat == "full" else rank)
    if remat == "none" and getattr(method, "use_dora", False):
        kept += _projected(spec)
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
