"""Opens what the entries work on: a base, a run, an adapter on either.

A base is checked before a weight is read. A run is read from its saved JSON; no
configuration is executed.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax.adapters import Known, read_adapters
from ftjax.checkpoints.hf import (
    Weights,
    check_vocab,
    find_model,
    load_params,
    open_weights,
    read_config,
)
from ftjax.checkpoints.jsonfile import inside
from ftjax.checkpoints.peft_others import Adapter
from ftjax.checkpoints.state import Checkpoints
from ftjax.data.tokenizer import FILES as TOKENIZER_FILES
from ftjax.data.tokenizer import Tokenizer, load_tokenizer
from ftjax.errors import UserError, require_regular
from ftjax.methods.freeze import trained_names
from ftjax.methods.lora import LoraPlan
from ftjax.methods.quant import Plan, abstract_quant, plan_quant, quant_axes, without
from ftjax.methods.virtual import virtual_count
from ftjax.models.config_reader import say
from ftjax.models.decoder import Decoder
from ftjax.models.presets import PRESETS
from ftjax.models.proj import abstract_params, find_sites, params_axes, put
from ftjax.models.registry import spec_from_config
from ftjax.models.spec import ModelSpec
from ftjax.objectives.ppo import VALUE
from ftjax.objectives.tasks import plan_task
from ftjax.quant.qtensor import QTensor
from ftjax.run_folder import choose_step, read_run_config
from ftjax.sharding import make_mesh, shard_tree
from ftjax.weights import join

PyTree = Any
Note = Callable[[str], None]
CONFIG = "config.json"


@dataclass(frozen=True)
class Base:
    """A model folder, checked; its weights are not read yet.

    Attributes:
      name: as it was asked for: 'base', a path, a name on the Hub.
      config: the contents of its config.json.
      eos_ids: every token that ends an answer.
      weights: where the tensors are; None if none were asked for.
    """

    dir: Path
    name: str
    config: dict[str, Any]
    spec: ModelSpec
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    weights: Weights | None

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the tensors as they are stored: names, shapes, bytes; read once.

        It does not depend on how the tensors are spread over files, nor on the dtype or
        the mesh that they are read to, so that a run, its adapter and a later use
        agree. Empty for a base without weights.
        """
        if self.weights is None:
            return ""
        tensors = self.weights.tensors

        def digest(name: str) -> str:
            tensor = tensors[name]
            content = hashlib.sha256(tensor.raw().data).hexdigest()
            return f"{name} {tensor.dtype} {tensor.shape} {content}\n"

        with ThreadPoolExecutor(4) as pool:
            lines = list(pool.map(digest, sorted(tensors)))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Policy:
    """A model that is ready to be applied: `model.apply(variables, ...)`.

    Attributes:
      variables: {'params': ...}, and the collection of an adapter, such as 'lora'.
      plan: of a LoRA adapter, or None.
      label: what this is, for people: model, run, step.
      max_positions: of a row, behind the virtual tokens if there are any.
      step: of the run's checkpoint, or None.
      chat: whether the run was trained on conversations.
      adapters: those that were read for the base, by name.
      frozen: the base alone, where it is whole beside what was trained; else None.
      task: of the run.
      saved: published names of weights of the base that were trained with an adapter.
    """

    base: Base
    model: Decoder
    variables: PyTree
    plan: LoraPlan | None
    label: str
    max_positions: int
    step: int | None = None
    chat: bool = False
    adapters: Known = field(default_factory=dict)
    frozen: PyTree | None = None
    task: str = "sft"
    saved: frozenset[str] = frozenset()


def open_base(
    path: str,
    revision: str = "main",
    chat_template: str = "",
    *,
    weights: bool = True,
    note: Note = say,
) -> Base:
    """Finds a model and checks its configuration, tensors, tokenizer and vocabulary.

    Args:
      path: 'base', a folder, a preset or a name on the Hub.
      revision: of a name on the Hub.
      chat_template: a Jinja file instead of the tokenizer's own.
      weights: whether there must be weights; a run from scratch needs none.
      note: told, once each, what is worth knowing about the files.

    Raises:
      UserError: naming the file, key or tensor that is wrong.
    """
    folder = find_model(path, revision)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        require_regular(inside(folder, name, named_by=str(folder)))
    config = read_config(folder)
    spec = spec_from_config(config, str(folder / CONFIG), note=note)
    found = None
    if weights:
        stored = config.get("quantization_config")
        found = open_weights(folder, spec, quantization=stored, note=note)
        spec = found.spec
    tokenizer = load_tokenizer(folder, chat_template)
    check_vocab(spec, tokenizer.vocab_size, str(folder))
    return Base(folder, path, config, spec, tokenizer, tokenizer.eos_ids, found)


def load_base(
    base: Base,
    dtype: Any,
    mesh: Mesh,
    *,
    formats: Plan | None = None,
    note: Note = say,
) -> dict[str, PyTree]:
    """{'params': ..., 'quant': ...}: on their devices, split by their logical axes.

    Args:
      dtype: of what stays floating point.
      formats: of the projections that are quantized while they are read; 'quant' is
        there if any are, or if the base is stored quantized.
      note: told what is worth knowing about the weights.
    """
    if base.weights is None:
        raise ValueError(f"{base.name} was opened without weights")
    model, plan = Decoder(base.spec), {**(formats or {}), **base.weights.formats}
    places = {"params": shard_tree(abstract_params(model), params_axes(model), mesh)}
    if plan:
        sites = find_sites(model)
        shapes, axes = abstract_quant(sites, plan), quant_axes(sites, plan)
        places["quant"] = shard_tree(shapes, axes, mesh)
    quant: PyTree = {}

    def place(path: tuple[str, ...], host: Any) -> Any:
        is_codes = isinstance(host, QTensor)
        sharding = places["quant" if is_codes else "params"]
        for name in path:
            sharding = sharding[name]
        leaf = jax.device_put(host, sharding)
        if is_codes:
            put(quant, path, leaf)
        return leaf

    name = jnp.dtype(dtype).name
    params = load_params(base.weights, dtype=name, put=place, formats=plan, note=note)
    if not plan:
        return {"params": params}
    return {"params": without(params, plan), "quant": quant}


def public_name(base: Base) -> str:
    """What another program can load the base by: its name on the Hub, or its folder."""
    if base.name in PRESETS:
        return PRESETS[base.name].hub
    on_hub = base.name != "base" and not Path(base.name).expanduser().is_dir()
    return base.name if on_hub else str(base.dir.absolute())


def open_policy(
    *,
    model: str = "",
    workdir: str = "",
    adapter: str = "",
    adapter_weights: str = "",
    adapter_rank: int = 0,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    weights: str = "auto",
    note: Note = say,
) -> Policy:
    """Loads what `--model`, `--workdir` and `--adapter` name.

    Args:
      model: a checkpoint folder, a preset, a name on the Hub or 'base'.
      workdir: a run instead; its own `config.json` says which base.
      adapter: as `adapter_weights` and `adapter_rank`, see `read_adapters`; on the base
        of a LoRA run instead of what that run has learned.
      dtype: of the weights and the computation.
      mesh: of all devices if None.
      weights: of a run: 'best', 'last', or 'auto' (the best if one was kept).
      note: told what is loaded and what is worth knowing.

    Raises:
      UserError: neither or both of model and workdir, or anything wrong in them.
    """
    if bool(model) == bool(workdir):
        raise UserError(
            "say what to use, once",
            where="--model, --workdir",
            expected="--model=DIR (or 'base', or a Hub name) or --workdir=RUN",
            got="both" if model else "neither",
        )
    mesh = make_mesh() if mesh is None else mesh
    adapters = (adapter, adapter_weights, adapter_rank)
    if workdir and not any(adapters):
        return _open_run(workdir, weights, dtype, mesh, note)
    if not workdir:
        base = open_base(model, note=note)
        return _open_model(base, adapters, dtype, mesh, note)
    config = read_run_config(workdir)
    if config["method"]["name"] == "full":
        raise UserError(
            "an adapter belongs to the model that it was trained on",
            where="--adapter, --workdir",
            got=f"{workdir} is a full fine-tune",
            fix="export the run with --to=merged and pass that folder as --model",
        )
    return _open_model(base_of_run(config, note), adapters, dtype, mesh, note)


def run_formats(config: dict[str, Any], model: Decoder) -> Plan:
    """What a run quantized of its base; nothing, if it knew no quantization yet."""
    if "quant" not in config:
        return {}
    return plan_quant(find_sites(model), SimpleNamespace(**config["quant"]))


def base_of_run(config: dict[str, Any], note: Note = say) -> Base:
    """The model that a run was trained on, checked; its weights are not read."""
    model = config["model"]
    scratch = bool(model.get("from_scratch"))
    return open_base(
        model["path"],
        model.get("revision", "main"),
        config["data"].get("chat_template", ""),
        weights=not scratch,
        note=note,
    )


def _open_run(workdir: str, weights: str, dtype: Any, mesh: Mesh, note: Note) -> Policy:
    config = read_run_config(workdir)
    base = base_of_run(config, note)
    decoder = Decoder(base.spec, dtype=dtype)
    folder = Path(workdir).expanduser() / "checkpoints"
    saved = Checkpoints(folder, report=note)
    step, which = choose_step(saved, weights)
    meta = saved.meta(step)
    _check_hash(meta.get("base_hash"), base, f"{folder}/{step}/meta.json")
    task, settings = config.get("task", "sft"), SimpleNamespace(**config["method"])
    method = plan_task(decoder, task, settings)
    like = {
        name: _like(part.shapes, part.axes, mesh) for name, part in method.parts.items()
    }
    trained = saved.restore(step, {"trained": like}, partial=True)["trained"]
    frozen = None
    if method.whole:
        variables = jax.tree.map(lambda w: w.astype(dtype), trained)
    else:
        formats = run_formats(config, decoder)
        loaded = load_base(base, dtype, mesh, formats=formats, note=note)
        frozen = method.rest(loaded)
        variables = join(frozen, trained)
    # It serves the training alone: what a policy says does not depend on it.
    variables.pop(VALUE, None)
    return Policy(
        base,
        decoder,
        variables,
        method.lora,
        f"run {workdir}, step {step} ({which})",
        base.spec.max_positions - virtual_count(method),
        step,
        bool(meta.get("chat")),
        frozen=frozen if method.frozen_is_base else None,
        task=task,
        saved=trained_names(method, base.spec),
    )


def _like(shapes: PyTree, axes: PyTree, mesh: Mesh) -> PyTree:
    shardings = shard_tree(shapes, axes, mesh)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _open_model(
    base: Base, adapters: tuple[str, str, int], dtype: Any, mesh: Mesh, note: Note
) -> Policy:
    """A base alone, or with adapters from folders."""
    decoder = Decoder(base.spec, dtype=dtype)
    check = partial(check_adapter, base, note)
    chosen = read_adapters(*adapters, model=decoder, check=check)
    frozen = load_base(base, dtype, mesh, note=note)
    variables = chosen.over(frozen, base.spec, mesh)
    label = f"{chosen.label} on {base.name}" if chosen.label else f"model {base.name}"
    most = base.spec.max_positions
    most -= chosen.adapter.virtual if chosen.adapter else 0
    return Policy(
        base,
        decoder,
        variables,
        chosen.plan,
        label,
        most,
        adapters=chosen.known,
        frozen=frozen,
        saved=frozenset(chosen.adapter.saved if chosen.adapter else ()),
    )


def check_adapter(base: Base, note: Note, adapter: Adapter, where: str) -> None:
    """Refuses an adapter of another base; notes one that does not say."""
    if not adapter.base_hash:
        made_for = adapter.base_name or "unknown"
        note(
            f"{where}: does not say which weights it was trained on (base model:"
            f" {made_for}); it is put on {base.name} unverified"
        )
    _check_hash(adapter.base_hash, base, where)


def _check_hash(expected: str | None, base: Base, where: str) -> None:
    """Same shapes with other weights would be silent nonsense."""
    if not expected or base.weights is None:
        return
    found = base.hash
    if found != expected:
        raise UserError(
            "this was trained on another base: same shapes, other weights",
            where=where,
            expected=f"base weights {expected[:16]}",
            got=f"{found[:16]} in {base.dir}",
            fix="pass the base that it was trained on",
        )
