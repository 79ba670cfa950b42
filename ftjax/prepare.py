"""From a config to what a run is made of: data, model, trained part, memory.

`check` shows these, `train` runs them; both call the same functions, so that what was
checked is what runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax.config import (
    check_devices,
    data_settings,
    prompt_room,
    total_steps,
    validate,
)
from ftjax.data.dataset import Dataset, build_dataset, note_overlap
from ftjax.data.feed import is_file
from ftjax.data.frame import Frame
from ftjax.data.loader import MULTIPLE, Loader, row_length
from ftjax.data.report import DataReport
from ftjax.data.stream import stream_frame
from ftjax.errors import UserError
from ftjax.loading import (
    Base,
    load_base,
    open_base,
    open_other,
    stored_formats,
)
from ftjax.methods.dora import with_magnitudes
from ftjax.methods.parts import Method, Row
from ftjax.methods.quant import Plan, plan_quant, stored_plan
from ftjax.methods.several import Update
from ftjax.methods.virtual import begin_with, virtual_count
from ftjax.models.decoder import Decoder
from ftjax.models.names import Path as LeafPath
from ftjax.models.names import model_weights
from ftjax.models.proj import (
    HEAD,
    abstract_params,
    find_sites,
    init_params,
    params_axes,
)
from ftjax.models.spec import ModelSpec
from ftjax.objectives.tasks import check_sharing, plan_task, task_of
from ftjax.optimizers.muon import Matrices
from ftjax.rl.rewards import find_rewards
from ftjax.sharding import make_mesh, shard_tree
from ftjax.step import Objective

PyTree = Any


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked: nothing is in memory yet but the rows."""

    mesh: Mesh
    base: Base
    shape: "Shape"
    data: "Data"
    steps: int
    aim: "Aim"


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
        logits=task_of(config.task).logits,
    )
    # A mapped step has no mesh inside: each device sees its own rows.
    shape = prepare_shape(config, base, None if config.parallel == "pmap" else mesh)
    aim = plan_objective(config.task, config.loss, shape.model, base)
    if task_of(config.task).online:
        find_rewards(config.reward)  # refuses one that is not there
    room = base.spec.max_positions - virtual_count(shape.method)
    data = prepare_data(config, base, room)
    steps = total_steps(config, data.rows)
    return Prepared(mesh, base, shape, data, steps, aim)


@dataclass(frozen=True)
class Aim:
    """What a run trains for, before any weight is read.

    `teacher` and `reference` are other models that the objective looks at, if it does.
    """

    objective: Objective
    teacher: Base | None = None
    reference: Base | None = None


def plan_objective(name: str, loss: Any, model: Decoder, base: Base) -> Aim:
    """The objective of a task.

    Args:
      name: of the task.
      loss: its settings, `config.loss`.
      model: of the policy; `base` is what it was made of.

    Raises:
      UserError: a loss that cannot be; a teacher or a reference with another
        vocabulary, or no teacher at all.
    """
    task, reference = task_of(name), getattr(loss, "reference", "base")
    other = None
    if reference != "base":
        other = open_other(reference, base, "config.loss.reference")
    if task.guided is None:
        return Aim(task.make(model, loss), reference=other)
    if not loss.teacher:
        raise UserError(
            "there is no teacher",
            where="config.loss.teacher",
            expected="a checkpoint, a preset or a Hub name",
            fix="--config.loss.teacher=DIR",
        )
    teacher = open_other(loss.teacher, base, "config.loss.teacher")
    guide = model.clone(spec=teacher.spec, remat="none")
    return Aim(task.guided(model, guide, loss), teacher)


@dataclass
class Data:
    """The rows of a run.

    Of a stream nothing is read yet: `train` is empty, and there is no loader of it, but
    the `frame` of its batches.

    Attributes:
      length: the one T of its batches.
      rows: of an epoch that a step trains on; of prompts, their answers; of a stream 0.
      settings: those of `config.data`, filled in.
    """

    train: Dataset
    eval: Dataset | None
    loader: Loader | None
    eval_loader: Loader | None
    length: int
    rows: int
    frame: Frame | None
    settings: Any


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
    if task.online:
        c.max_length = prompt_room(c.max_length, config.rollout.max_new_tokens)

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

    train = _unread(c, config.task) if c.stream else build(c.train, "train")
    held_out = build(c.eval, "eval") if c.eval else None
    if held_out:
        note_overlap(train, held_out)
    if task.online:
        return _prompts(config, train, held_out, c)
    frame = stream_frame(c, task.reads, task.ends) if c.stream else None
    if frame is not None:
        length = frame.length
    else:
        both = (train, held_out) if held_out else (train,)
        length = row_length(*both, max_length=c.max_length, packing=c.packing)
    settings = {"length": length, "packing": c.packing, "seed": config.seed}
    loader = None if c.stream else Loader(train, shuffle=c.shuffle, **settings)
    eval_loader = Loader(held_out, shuffle=False, **settings) if held_out else None
    rows = loader.rows_per_epoch if loader else 0
    return Data(train, held_out, loader, eval_loader, length, rows, frame, c)


def _prompts(
    config: Any, train: Dataset, held_out: Dataset | None, settings: Any
) -> Data:
    """The order of the prompts; their rows are as long as prompt and answer may be."""
    c, both = config.rollout, (train, held_out) if held_out else (train,)
    longest = max(int(data.report.lengths.max()) for data in both)
    length = -(-(longest + c.max_new_tokens) // MULTIPLE) * MULTIPLE
    loader = Loader(
        train,
        length=longest,
        packing=False,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )
    rows = loader.rows_per_epoch * c.group * c.passes
    return Data(train, held_out, loader, None, length, rows, None, settings)


def _unread(c: Any, task: str) -> Dataset:
    """The data set of a stream, without rows.

    Raises:
      UserError: it is not there, or the task wants to see all rows first.
    """
    if task_of(task).reads in ("rated", "prompts"):
        raise UserError(
            "this task compares each row with another one, so it wants all rows first",
            where="config.task, config.data.stream",
            got=f"task={task}, stream=True",
            fix="--config.data.stream=False",
        )
    is_file(c.train)
    return Dataset([], DataReport(c.train, "train", c.max_length))


@dataclass(frozen=True)
class Shape:
    """A model and its method, by shape alone: nothing is read or compiled.

    `formats` are those of the projections that are quantized, `param_dtype` is that of
    the other frozen weights, but for those in `dtypes`.
    """

    model: Decoder
    method: Method
    formats: Plan
    dtype: Any
    param_dtype: Any
    dtypes: Mapping[LeafPath, str] = field(default_factory=dict)

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
    if method.begin is not None:
        method.begin(formats, stored_formats(base))  # or why it cannot
    own = leaf_dtypes(config.model, base.spec)
    return Shape(model, method, formats, dtype, param_dtype, own)


def leaf_dtypes(config: Any, spec: ModelSpec) -> dict[LeafPath, str]:
    """The dtypes of the norms and of the head, where the config names them.

    A tied head is the embedding.
    """
    head = ("embed_tokens", "embedding") if spec.tied else (*HEAD, "w")
    asked = {
        path: config.norm_dtype for path in model_weights(spec) if path[-1] == "scale"
    }
    asked[head] = config.head_dtype
    return {path: name for path, name in asked.items() if name != "auto"}


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
) -> tuple[PyTree, PyTree, Update | None]:
    """(trained, frozen, origin): the first two on their devices.

    The origin is what a method took off the base at the start (PiSSA, ...), on the
    host; None where the base is as it was.
    """
    method, begun = shape.method, None
    if method.begin is not None:
        begun = method.begin(shape.formats, stored_formats(base))
    if config.model.from_scratch:
        loaded = {"params": random_params(shape.model, config.seed, mesh)}
    else:
        dtype = jnp.dtype(jnp.float32) if method.whole else shape.param_dtype
        loaded = load_base(
            base,
            dtype,
            mesh,
            dtypes={} if method.whole else shape.dtypes,
            formats=shape.formats,
            changes=begun.changes if begun is not None else None,
        )
    trained, frozen = method.start(loaded, config.seed)
    if begun is not None and method.lora is not None:
        lora = begun.fill(trained["lora"])
        lora = with_magnitudes(lora, method.lora, loaded)
        trained = method.stored({**trained, "lora": lora})
    places = {
        name: shard_tree(part.shapes, part.axes, mesh)
        for name, part in method.parts.items()
    }
    origin = begun.update if begun is not None and begun.moves else None
    return jax.device_put(trained, places), frozen, origin


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
