"""From a config to what a run is made of: data, model, trained part, memory.

`check` shows these, `train` runs them; both call the same functions, so that what was
checked is what runs.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ftjax.checkpoints.hf import read_matrix
from ftjax.config import check_devices, data_settings, total_steps, validate
from ftjax.data.dataset import Dataset, build_dataset, note_overlap
from ftjax.data.loader import Loader, row_length
from ftjax.errors import UserError
from ftjax.loading import Base, load_base, open_base
from ftjax.methods.dora import with_magnitudes
from ftjax.methods.loftq import fit_errors, require_codes
from ftjax.methods.lora import plan_lora
from ftjax.methods.parts import Method, Row
from ftjax.methods.quant import Plan, plan_quant, stored_plan
from ftjax.methods.virtual import begin_with, virtual_count
from ftjax.models.decoder import Decoder
from ftjax.models.names import model_weights
from ftjax.models.proj import (
    HEAD,
    Path,
    abstract_params,
    find_sites,
    init_params,
    params_axes,
)
from ftjax.objectives.tasks import check_sharing, plan_task, task_of
from ftjax.optimizers.muon import Matrices
from ftjax.sharding import make_mesh, shard_tree
from ftjax.weights import join

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
    task = task_of(config.task)
    if task.guided is None:
        task.make(shape.model, config.loss)  # refuses settings that it does not know
    room = base.spec.max_positions - virtual_count(shape.method)
    data = prepare_data(config, base, room)
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


def prepare_data(config: Any, base: Base, room: int) -> Data:
    """Reads, checks, encodes and packs the data of a config.

    Args:
      config: of the run.
      base: its model.
      room: positions of a row, of those that the model knows.

    Raises:
      UserError: with file and line, for whatever cannot be trained on.
    """
    check_sharing(config)
    c, task = data_settings(config, room), task_of(config.task)

    def build(source: str, split: str) -> Dataset:
        found = build_dataset(
            source,
            base.tokenizer,
            c,
            vocab_size=base.spec.vocab_size,
            split=split,
            reads=task.reads,
        )
        found.ends, found.shared = task.ends, c.share_prompt
        return found

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

    `formats` are those of the projections that are quantized.
    """

    model: Decoder
    method: Method
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
    method = plan_task(model, config.task, config.method)
    if method.name == "prompt" and config.method.text:
        ids = base.tokenizer.encode([config.method.text], add_special=False)[0]
        method = begin_with(method, ids)
    formats = plan_quant(find_sites(model), config.quant)
    if base.weights is not None and base.weights.formats:
        stored = base.weights.formats
        formats = stored_plan(stored, formats, base.name, method.whole)
    refuse_quantized(method, formats)
    if begins_as_error(config):
        plan = plan_lora(find_sites(model), config.method)
        codes = base.weights is not None and bool(base.weights.formats)
        require_codes(plan, formats, codes)
    return Shape(model, method, formats, dtype, param_dtype)


def refuse_quantized(method: Method, formats: Plan) -> None:
    """Weights of the base that are trained must not be quantized.

    Raises:
      UserError: naming the first that is.
    """
    part = method.parts.get("params")
    for path in formats if part is not None else ():
        tree: Any = part.shapes if part is not None else {}
        for name in (*path, "w"):
            tree = tree.get(name) if isinstance(tree, dict) else None
        if tree is not None:
            raise UserError(
                "a weight that would be trained is quantized: codes have no gradient",
                where="config.method",
                got=f"{'.'.join(path)} is {formats[path]}",
                fix=f"leave it as it is: --config.quant.pattern={path[-1]}=none",
            )


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
        dtype = jnp.dtype(jnp.float32) if shape.method.whole else shape.param_dtype
        loaded = load_base(base, dtype, mesh, formats=shape.formats)
    trained, frozen = shape.method.start(loaded, config.seed)
    places = {
        name: shard_tree(part.shapes, part.axes, mesh)
        for name, part in shape.method.parts.items()
    }
    trained = jax.device_put(trained, places)
    if begins_as_error(config):
        trained = fit_trained(trained, frozen, config, base, shape, mesh)
    return trained, frozen


def begins_as_error(config: Any) -> bool:
    """Whether the update begins as the error of quantization (LoftQ)."""
    return config.method.get("init") == "loftq"


def fit_trained(
    trained: PyTree, frozen: PyTree, config: Any, base: Base, shape: Shape, mesh: Mesh
) -> PyTree:
    """The trained part with LoftQ's start; reads the base's weights once more."""
    plan = plan_lora(find_sites(shape.model), config.method)
    weights, named = base.weights, model_weights(base.spec)
    if weights is None:
        raise ValueError(f"{base.name} was opened without weights")

    def read(path: Path, layer: int) -> np.ndarray:
        return read_matrix(weights, named[*path, "w"], layer, lambda _: None)

    lora = fit_errors(trained["lora"], plan, frozen["quant"], read)
    lora = with_magnitudes(lora, plan, join(frozen, trained))
    part = shape.method.parts["lora"]
    place = shard_tree(part.shapes, part.axes, mesh)
    return {**trained, "lora": jax.device_put(lora, place)}


def random_params(model: Decoder, seed: int, mesh: Mesh) -> PyTree:
    """Fresh weights, each from N(0, 1 / inputs) (embeddings: N(0, 0.02^2))."""
    shardings = shard_tree(abstract_params(model), params_axes(model), mesh)
    init = jax.jit(partial(init_params, model), out_shardings=shardings)
    return init(jax.random.key(seed))


def trainable_rows(shape: Shape) -> list[Row]:
    """The table of what is trained, one row per target, and a row for the whole."""
    total = sum(leaf.size for leaf in jax.tree.leaves(shape.params))
    trained = shape.method.count
    whole = Row("all", "", "", 0, trained, 100 * trained / total)
    return [*shape.method.rows, whole]
