"""PEFT's adapters of every kind; here (IA)^3, prompt tuning and prefix tuning.

`ia3_l` is [out, 1], or [1, in] of a feed-forward module. `prompt_embeddings` is [n, D]
of a prompt, and [n, layers * 2 * heads * head_dim] of a prefix: layer by layer the
keys, then the values.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np

from ftjax.checkpoints import peft
from ftjax.checkpoints.jsonfile import inside, read_json
from ftjax.checkpoints.peft_config import CONFIG, read_config, refuse, targeted
from ftjax.checkpoints.peft_saved import (
    SEQ_CLS,
    Saved,
    saved_config,
    saved_entries,
    scored_entries,
    take_head,
    take_saved,
)
from ftjax.checkpoints.peft_tensors import nothing_left, take
from ftjax.checkpoints.peft_vera import FIXED as VERA_FIXED
from ftjax.checkpoints.peft_vera import vera_in, vera_out
from ftjax.checkpoints.tensors import Entry, Tensor, write_tensors
from ftjax.errors import UserError
from ftjax.methods.heads import SCORE
from ftjax.methods.lora import LoraPlan
from ftjax.methods.residual import unmoved
from ftjax.methods.several import Update
from ftjax.models.proj import HEAD, INPUTS, OUTPUTS, Path, Site, put, site_names
from ftjax.models.spec import ModelSpec
from ftjax.models.vera import is_vera

# Our collection -> PEFT's name.
KINDS = {
    "lora": "LORA",
    "vera": "VERA",
    "ia3": "IA3",
    "prompt": "PROMPT_TUNING",
    "prefix": "PREFIX_TUNING",
}
WITH_WEIGHTS = ("lora", "vera", "ia3")  # may have whole weights beside them
EMBEDDINGS = "prompt_embeddings"
# Keys that change what is computed -> what is computed here.
FIXED: dict[str, dict[str, Any]] = {
    "vera": VERA_FIXED,
    "ia3": {"fan_in_fan_out": False},
    "prompt": {"num_transformer_submodules": 1},
    "prefix": {"num_transformer_submodules": 1, "prefix_projection": False},
}


@dataclass(frozen=True)
class Adapter:
    """What `load_any` found.

    Attributes:
      kind: the collection's name, of `KINDS`.
      tree: the collection, float32, on the host.
      plan: ranks and scales, where it is 'lora'.
      base_name: of the model it was trained on, as it says.
      base_hash: of that model's weights, or None if another program wrote the adapter.
      saved: weights of the base in their new state, by their published names.
      head: of a reward model, {'w': [D]}; None of any other.
    """

    kind: str
    tree: Any
    plan: LoraPlan | None
    base_name: str
    base_hash: str | None
    saved: Saved = field(default_factory=dict)
    head: Any = None

    @property
    def virtual(self) -> int:
        """How many virtual tokens stand before a row."""
        if self.kind == "prompt":
            return len(self.tree["tokens"])
        return self.tree["k"].shape[1] if self.kind == "prefix" else 0


def adapter_kind(names: Any) -> str | None:
    """The collection of some variables, or trained parts, that PEFT has files for."""
    return next((kind for kind in KINDS if kind in names), None)


def why_unsaved(
    variables: Mapping[str, Any], saved: Collection[str], sites: Mapping[Path, Site]
) -> str:
    """Why PEFT has no files for these; empty where it has, or there is no adapter."""
    kind = adapter_kind(variables)
    if kind is None or not (saved or SCORE in variables):
        return ""
    if kind not in WITH_WEIGHTS:
        what = "weights of the base" if saved else "the head of a reward model"
        return f"PEFT's files of {KINDS[kind]} have no place for {what}"
    for path, site in sites.items():
        both = {f"{name}.weight" for name in site_names(site)} & set(saved)
        if both and _at(variables[kind], path):
            return f"{min(both)} is trained, and has an update beside it"
    return ""


def idle(kind: str, tree: Any, origin: Update | None) -> str:
    """Why an adapter that began as `origin`, if it did, changes nothing; else empty."""
    if kind == "ia3" and all(bool(np.all(x == 1)) for x in jax.tree.leaves(tree)):
        return "its factors are one everywhere"
    if kind == "lora" and unmoved(tree, origin):
        return "it is as it began"
    if kind == "vera":
        leaves = [x for x in jax.tree.leaves(tree, is_leaf=is_vera) if is_vera(x)]
        moved = any(bool(np.any(np.asarray(x.lambda_b) != 0)) for x in leaves)
        return "" if moved else "its lambda_b is zero everywhere"
    zero = kind == "lora" and peft.is_zero(tree)
    return "its A or B is zero everywhere" if zero else ""


def save_any(
    folder: FilePath,
    variables: Mapping[str, Any],
    plan: LoraPlan | None,
    sites: Mapping[Path, Site],
    base_name: str,
    base_hash: str | None,
    *,
    saved: Collection[str] = (),
    spec: ModelSpec | None = None,
) -> None:
    """Writes the adapter among some variables, so that PEFT loads it.

    Args:
      folder: is made if it is missing; without an adapter in it yet.
      variables: with one of `KINDS`, and the head of a reward model if it is one.
      plan: of a LoRA adapter.
      sites: of the model.
      base_name: written as `base_model_name_or_path`.
      base_hash: of the base's weights, kept in the header of the tensors.
      saved: published names of weights of the base that belong to it.
      spec: of the model, where there are any, or a head.
    """
    kind = adapter_kind(variables)
    if kind is None:
        raise ValueError(f"no adapter among {sorted(variables)}")
    tree, entries, task = variables[kind], list[Entry](), dict[str, Any]()
    if spec and SCORE in variables:
        head, task = variables[SCORE], {"task_type": SEQ_CLS}
        entries = scored_entries(head, variables["params"], saved, spec)
    elif spec and saved:
        entries = saved_entries(variables["params"], saved, spec)
    if kind == "lora":
        if plan is None:
            raise ValueError("a LoRA adapter is saved with its plan")
        more = saved_config(entries, tie=bool(spec and spec.tied)) | task
        peft.save_adapter(folder, tree, plan, base_name, base_hash, entries, more)
        return
    by_site = {"ia3": _ia3_out, "vera": vera_out}
    write = by_site[kind] if kind in by_site else partial(_prompt_out, kind)
    tensors, own = write(tree, sites)
    own |= saved_config(entries) | task | {"base_model_name_or_path": base_name}
    entries += [Entry(n, x.shape, partial(np.asarray, x)) for n, x in tensors.items()]
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} | ({peft.HASH_KEY: base_hash} if base_hash else {})
    _write_config(folder, kind, own)
    write_tensors(folder / peft.TENSORS, entries, np.dtype(np.float32), metadata)


def _write_config(folder: FilePath, kind: str, own: Mapping[str, Any]) -> None:
    config = {
        "auto_mapping": None,
        "inference_mode": True,
        "modules_to_save": None,
        "peft_type": KINDS[kind],
        "revision": None,
        "task_type": "CAUSAL_LM",
        **FIXED[kind],
        **own,
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def _ia3_out(tree: Any, sites: Mapping[Path, Site]) -> tuple[Any, dict[str, Any]]:
    """Tensors and configuration of an (IA)^3 collection."""
    tensors, targets, fed = {}, [], []
    for path, site in sites.items():
        sides = _at(tree, path)
        for side, factor in sides.items():
            targets.append(path[-1])
            fed += [path[-1]] if side == INPUTS else []
            rows = np.asarray(factor, np.float32).reshape(factor.shape[0], -1)
            for name, row in zip(site_names(site), rows, strict=True):
                shaped = row[None] if side == INPUTS else row[:, None]
                tensors[f"{peft.PREFIX}{name}.ia3_l"] = shaped
    own: dict[str, Any] = {"init_ia3_weights": True, "exclude_modules": None}
    own |= {"target_modules": sorted(targets), "feedforward_modules": sorted(fed)}
    return tensors, own


def _prompt_out(kind: str, tree: Any, sites: Any) -> tuple[Any, dict[str, Any]]:
    """Tensors and configuration of virtual tokens."""
    if kind == "prompt":
        values = np.asarray(tree["tokens"], np.float32)
        own: dict[str, Any] = {"token_dim": values.shape[1]}
        own |= {"prompt_tuning_init": "RANDOM"}
    else:
        pair_LPnKH = np.stack([tree["k"], tree["v"]], axis=1).astype(np.float32)
        layers, _, n, heads, dim = pair_LPnKH.shape
        values = pair_LPnKH.transpose(2, 0, 1, 3, 4).reshape(n, -1)
        own = {"token_dim": heads * dim, "num_attention_heads": heads}
        own |= {"num_layers": layers, "encoder_hidden_size": heads * dim}
    values = np.ascontiguousarray(values)
    return {EMBEDDINGS: values}, own | {"num_virtual_tokens": len(values)}


def load_any(folder: FilePath, sites: Mapping[Path, Site], spec: ModelSpec) -> Adapter:
    """Reads an adapter of any kind for a model.

    Raises:
      UserError: naming the file, the config key or the tensor, for whatever is missing,
        left over, of another shape, or not computed by ftjax.
    """
    config: dict[str, Any] = {}
    if (folder / CONFIG).is_file():
        config = read_json(inside(folder, CONFIG, named_by=str(folder)))
    names = {theirs: ours for ours, theirs in KINDS.items() if ours != "lora"}
    kind, where = names.get(str(config.get("peft_type"))), folder / CONFIG
    if kind is None:
        return _load_lora(folder, sites, spec)
    for key, value in FIXED[kind].items():
        given = config.get(key)
        if given not in (None, value, []):
            raise refuse(where, key, given, repr(value))
    if kind not in WITH_WEIGHTS and config.get("modules_to_save"):
        raise refuse(where, "modules_to_save", config["modules_to_save"], "None")
    tensors, head = peft.read_tensors(folder), None
    body = spec
    if kind in WITH_WEIGHTS:
        config, body, head = take_head(config, tensors, spec, folder)
    saved = take_saved(config, tensors, body, folder)
    if kind == "vera":
        tree = vera_in(config, tensors, sites, where)
    elif kind == "ia3":
        tree = _ia3_in(config, tensors, sites, where)
    else:
        tree = _prompt_in(kind, config, tensors, spec, folder)
    base_hash = peft.read_metadata(folder / peft.TENSORS).get(peft.HASH_KEY)
    base_name = str(config.get("base_model_name_or_path") or "")
    return Adapter(kind, tree, None, base_name, base_hash, saved, head)


def _load_lora(
    folder: FilePath, sites: Mapping[Path, Site], spec: ModelSpec
) -> Adapter:
    config, tensors = read_config(folder), peft.read_tensors(folder)
    left = dict(tensors)
    config, body, head = take_head(config, left, spec, folder)
    saved = take_saved(config, left, body, folder)
    found = peft.load_adapter(folder, sites, tensors.keys() - left.keys())
    about = (found.base_name, found.base_hash)
    return Adapter("lora", found.lora, found.plan, *about, saved, head)


def _ia3_in(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    sites: Mapping[Path, Site],
    where: FilePath,
) -> Any:
    """The collection; one where an adapter leaves a layer out."""
    for key in ("target_modules", "feedforward_modules"):
        if config.get(key) is None:
            raise refuse(where, key, None, "a list of module names")
    left = dict(tensors)
    tree: dict[str, Any] = {}
    for path, site in sites.items():
        names = site_names(site)
        aimed = [
            path != HEAD
            and targeted(config["target_modules"], name, where)
            and not targeted(config.get("exclude_modules") or [], name, where)
            for name in names
        ]
        if not any(aimed):
            continue
        fed = [
            targeted(config["feedforward_modules"], name, where)
            for name, hit in zip(names, aimed, strict=True)
            if hit
        ]
        if any(fed) != all(fed):
            raise refuse(where, "feedforward_modules", path[-1], "every layer or none")
        side = INPUTS if all(fed) else OUTPUTS
        shape = site.inputs if side == INPUTS else site.outputs
        size = math.prod(shape)
        stored = (1, size) if side == INPUTS else (size, 1)
        rows = np.ones((len(names), *shape), np.float32)
        for i, name in enumerate(names):
            if aimed[i]:
                key = f"{peft.PREFIX}{name}.ia3_l"
                rows[i] = take(left, key, stored, where.parent).reshape(shape)
        put(tree, (*path, side), rows)
    nothing_left(left, where.parent)
    if not tree:
        raise UserError("the adapter is empty", where=where)
    return tree


def _prompt_in(
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    spec: ModelSpec,
    folder: FilePath,
) -> Any:
    n = config.get("num_virtual_tokens")
    if not isinstance(n, int) or n < 1:
        raise refuse(folder / CONFIG, "num_virtual_tokens", n, "a positive number")
    left = dict(tensors)
    pair = (spec.n_layers, 2, spec.n_kv_heads, spec.head_dim)
    width = spec.d_model if kind == "prompt" else math.prod(pair)
    values = take(left, EMBEDDINGS, (n, width), folder)
    nothing_left(left, folder)
    if kind == "prompt":
        return {"tokens": values}
    pair_LPnKH = values.reshape(n, *pair).transpose(1, 2, 0, 3, 4)
    return {name: np.ascontiguousarray(pair_LPnKH[:, i]) for i, name in enumerate("kv")}


def _at(tree: Any, path: Path) -> Any:
    for name in path:
        tree = tree.get(name, {})
    return tree
