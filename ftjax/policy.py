"""Opens what the entries work on: a base, a run, an adapter on either.

A run is read from its saved JSON; no configuration is executed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax.adapters import Known, read_adapters
from ftjax.checkpoints.peft_others import Adapter
from ftjax.checkpoints.state import Checkpoints
from ftjax.errors import UserError
from ftjax.loading import Base, load_base, open_base, stored_formats
from ftjax.methods.freeze import trained_names
from ftjax.methods.lora import LoraPlan
from ftjax.methods.parts import Method
from ftjax.methods.quant import Plan, plan_quant
from ftjax.methods.several import Update
from ftjax.methods.virtual import virtual_count
from ftjax.models.config_reader import say
from ftjax.models.decoder import Decoder
from ftjax.models.proj import find_sites
from ftjax.objectives.ppo import VALUE
from ftjax.objectives.tasks import plan_task, task_of
from ftjax.run_folder import CONFIG, Section, choose_step, read_run_config
from ftjax.sharding import make_mesh, shard_tree
from ftjax.weights import join
from ftjax.workdir import compare_values

PyTree = Any
Note = Callable[[str], None]


@dataclass(frozen=True)
class Policy:
    """A model that is ready to be applied: `model.apply(variables, ...)`.

    Attributes:
      variables: {'params': ...}, the collection of an adapter, such as 'lora', and
        'score', the head of a reward model.
      plan: of a LoRA adapter, or None.
      label: what this is, for people: model, run, step.
      max_positions: of a row, behind the virtual tokens if there are any.
      step: of the run's checkpoint, or None.
      chat: whether the run was trained on conversations.
      adapters: those that were read for the base, by name.
      frozen: the base alone, where it is whole beside what was trained; else None.
      task: of the run.
      saved: published names of weights of the base that were trained with an adapter.
      formats: of the weights of the base that the run quantized.
      origin: the update at the start of a run that took it off its base: `variables`
        has what was left.
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
    formats: Plan = field(default_factory=dict)
    origin: Update | None = None


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
        base = open_base(model, reward=True, note=note)
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
    return plan_quant(find_sites(model), Section(**config["quant"]))


def base_of_run(config: dict[str, Any], note: Note = say) -> Base:
    """The model that a run was trained on, checked; its weights are not read."""
    model = config["model"]
    scratch = bool(model.get("from_scratch"))
    if model["path"].startswith(".") and not Path(model["path"]).is_dir():
        raise UserError(
            "the base of the run is not where its configuration says",
            where="config.json of the run: model.path",
            expected="a folder, named from where the run was started",
            got=f"{model['path']}, which is not there from {Path.cwd()}",
            fix="run the command from the folder in which the run was started",
        )
    return open_base(
        model["path"],
        model.get("revision", "main"),
        config["data"].get("chat_template", ""),
        weights=not scratch,
        logits=task_of(config.get("task", "sft")).logits,
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
    _check_tokens(meta, base, f"{folder}/{step}/meta.json", note)
    _require_same_method(config, meta, Path(workdir).expanduser() / CONFIG)
    task, settings = config.get("task", "sft"), Section(**config["method"])
    method = plan_task(decoder, task, settings)
    like = {
        name: _like(part.shapes, part.axes, mesh) for name, part in method.parts.items()
    }
    trained = saved.restore(step, {"trained": like}, partial=True)["trained"]
    frozen, origin, formats = None, None, run_formats(config, decoder)
    if method.whole:
        variables = jax.tree.map(lambda w: w.astype(dtype), trained)
    else:
        loaded, origin = _load_left(method, base, dtype, mesh, formats, note)
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
        formats=formats,
        origin=origin,
    )


def _load_left(
    method: Method, base: Base, dtype: Any, mesh: Mesh, formats: Plan, note: Note
) -> tuple[PyTree, Update | None]:
    """The base of a run as the run had it, and the update that it took off, if any.

    In another dtype than the run's what is left is rounded to that one, as every base.
    """
    begun = None
    if method.begin is not None:
        begun = method.begin(formats, stored_formats(base))
        begun = begun if begun.moves else None
    changes = begun.changes if begun is not None else None
    loaded = load_base(base, dtype, mesh, formats=formats, changes=changes, note=note)
    return loaded, None if begun is None else begun.update


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


def _require_same_method(config: Any, meta: Any, where: Path) -> None:
    """What was trained says nothing of its rank or strength: an edited file would."""
    names = [name for name in ("method", "quant") if name in config and name in meta]
    compare_values(
        {name: meta[name] for name in names},
        {name: config[name] for name in names},
        what="the configuration of a run is not that of its checkpoint",
        where=where,
        fix="restore the file",
    )


def _check_tokens(meta: Any, base: Base, where: str, note: Note) -> None:
    """A run was trained on the ids, and the template, of one tokenizer.

    Raises:
      UserError: the ids mean other texts now.
    """
    saved, found = meta.get("tokenizer"), base.tokenizer.fingerprint()
    if saved and saved != found:
        raise UserError(
            "the tokenizer of the base is another one than the run was trained with",
            where=where,
            expected=f"ids {saved[:12]}",
            got=f"{found[:12]} in {base.tokenizer.path}",
            fix="restore the tokenizer's files",
        )
    if "template" in meta and meta["template"] != base.tokenizer.template_hash:
        note("the chat template is another one than the run was trained with")


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
