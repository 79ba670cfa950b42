"""From a config to what a run is made of: data, model, trained part, memory.

`check` shows these, `train` runs them; both call the same functions, so that what was
checked is what runs.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax.config import check_devices, check_positions, total_steps, validate
from ftjax.data.dataset import Dataset, build_dataset, note_overlap
from ftjax.data.loader import Loader, row_length
from ftjax.loading import Base, load_base, open_base
from ftjax.methods.lora import LoraPlan, init_lora, lora_axes, plan_lora
from ftjax.methods.quant import Plan, plan_quant
from ftjax.methods.split import split
from ftjax.models.decoder import Decoder
from ftjax.models.proj import (
    HEAD,
    abstract_params,
    find_sites,
    init_params,
    params_axes,
)
from ftjax.optimizers.muon import Matrices
from ftjax.sharding import make_mesh, shard_tree

PyTree = Any


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked: nothing is in memory yet but the rows."""

    mesh: Mesh
    base: Base
    shape: "Shape"
    data: "Data"
    steps: int


def prepare(config: Any) -> Prepared:
    """Checks a config against its devices, its model and its data.

    Raises:
      UserError: for whatever would stop the run later.
    """
    validate(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_devices(config, mesh.size)
    base = open_base(
        config.model.path,
        config.model.revision,
        config.data.chat_template,
        weights=not config.model.from_scratch,
    )
    shape = prepare_shape(config, base, mesh)
    data = prepare_data(config, base)
    steps = total_steps(config, data.loader.rows_per_epoch)
    return Prepared(mesh, base, shape, data, steps)


@dataclass
class Data:
    """The rows of a run; `length` is the one T of its batches."""

    train: Dataset
    eval: Dataset | None
    loader: Loader
    eval_loader: Loader | None
    length: int


def prepare_data(config: Any, base: Base) -> Data:
    """Reads, checks, encodes and packs the data of a config.

    Raises:
      UserError: with file and line, for whatever cannot be trained on.
    """
    check_positions(config, base.spec.max_positions)
    c = config.data

    def build(source: str, split: str) -> Dataset:
        return build_dataset(
            source, base.tokenizer, c, vocab_size=base.spec.vocab_size, split=split
        )

    train = build(c.train, "train")
    held_out = build(c.eval, "eval") if c.eval else None
    if held_out:
        note_overlap(train, held_out)
    both = (train, held_out) if held_out else (train,)
    length = row_length(*both, max_length=c.max_length, packing=c.packing)
    settings = {"length": length, "packing": c.packing, "seed": config.seed}
    loader = Loader(train, shuffle=c.shuffle, **settings)
    eval_loader = Loader(held_out, shuffle=False, **settings) if held_out else None
    return Data(train, held_out, loader, eval_loader, length)


@dataclass(frozen=True)
class Shape:
    """A model and its method, by shape alone: nothing is read or compiled.

    `plan` is LoRA's; None for full fine-tuning. `formats` are those of the projections
    that are quantized.
    """

    model: Decoder
    plan: LoraPlan | None
    formats: Plan
    dtype: Any
    param_dtype: Any

    @property
    def params(self) -> PyTree:
        """Of the whole model, as if nothing were quantized."""
        return abstract_params(self.model)

    @property
    def matrices(self) -> Matrices:
        """How the projections inside the layers are matrices, for `make_optimizer`."""
        sites = find_sites(self.model).items()
        return {
            path: (int(site.layers is not None), len(site.inputs))
            for path, site in sites
            if path != HEAD
        }


def prepare_shape(config: Any, base: Base, mesh: Mesh | None = None) -> Shape:
    """The model and the trained part of a config.

    Raises:
      UserError: if a target matches nothing, or a rank does not fit.
    """
    dtype = compute_dtype(config.model.dtype)
    stored = config.model.param_dtype
    param_dtype = dtype if stored == "auto" else jnp.dtype(stored)
    model = Decoder(base.spec, dtype=dtype, remat=config.model.remat, mesh=mesh)
    plan, sites = None, find_sites(model)
    if config.method.name == "lora":
        plan = plan_lora(sites, config.method)
    formats = plan_quant(sites, config.quant)
    return Shape(model, plan, formats, dtype, param_dtype)


def compute_dtype(name: str) -> Any:
    """'auto' is bfloat16 where it is fast, on GPU and TPU, and float32 on CPU."""
    if name != "auto":
        return jnp.dtype(name)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def load_variables(
    config: Any, base: Base, shape: Shape, mesh: Mesh
) -> tuple[PyTree, PyTree]:
    """(trained, frozen), on their devices."""
    if config.model.from_scratch:
        loaded = {"params": random_params(shape.model, config.seed, mesh)}
    else:
        full = config.method.name == "full"
        dtype = jnp.dtype(jnp.float32) if full else shape.param_dtype
        loaded = load_base(base, dtype, mesh, formats=shape.formats)
    lora = None
    if shape.plan is not None:
        lora = init_lora(shape.plan, config.seed, config.method.init)
        lora = jax.device_put(lora, shard_tree(lora, lora_axes(shape.plan), mesh))
    return split(config.method.name, loaded, lora)


def random_params(model: Decoder, seed: int, mesh: Mesh) -> PyTree:
    """Fresh weights, each from N(0, 1 / inputs) (embeddings: N(0, 0.02^2))."""
    shardings = shard_tree(abstract_params(model), params_axes(model), mesh)
    init = jax.jit(partial(init_params, model), out_shardings=shardings)
    return init(jax.random.key(seed))


def trainable_rows(shape: Shape) -> list[tuple[str, str, str, int, int, float]]:
    """The table of what is trained, one row per target, and a row for the whole.

    Columns: target, shape of one weight, rank, layers, trained parameters, and their
    percentage of the weights they update.
    """
    total = sum(leaf.size for leaf in jax.tree.leaves(shape.params))
    rows: list[tuple[str, str, str, int, int, float]] = []
    trained = total
    if shape.plan is not None:
        trained = sum(site.count for site in shape.plan.sites.values())
        for path, at in shape.plan.sites.items():
            layers = sum(rank > 0 for rank in at.ranks)
            size = math.prod(at.site.inputs) * math.prod(at.site.outputs)
            ranks = sorted({rank for rank in at.ranks if rank})
            rows.append(
                (
                    path[-1],
                    f"{math.prod(at.site.inputs)} x {math.prod(at.site.outputs)}",
                    "/".join(map(str, ranks)),
                    layers,
                    at.count,
                    100 * at.count / (layers * size),
                )
            )
    rows.append(("all", "", "", 0, trained, 100 * trained / total))
    return rows
