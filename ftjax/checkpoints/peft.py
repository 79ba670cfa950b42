"""LoRA adapters in PEFT's files: `adapter_config.json`, `adapter_model.safetensors`.

A layer's `a` [*inputs, r] is PEFT's `lora_A.weight` [r, in], transposed, and its `b`
[r, *outputs] is `lora_B.weight` [out, r]; DoRA's `m` [*outputs] is
`lora_magnitude_vector` [out]. PEFT ignores names that it does not expect
and then runs with B = 0; here every key is accounted for, on the way out and in.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.checkpoints.jsonfile import inside
from ftjax.checkpoints.peft_config import (
    CONFIG,
    check_targets,
    lookup,
    read_config,
)
from ftjax.checkpoints.tensors import (
    FLOATS,
    Entry,
    Tensor,
    read_header,
    write_tensors,
)
from ftjax.errors import UserError
from ftjax.methods.lora import LoraPlan, SitePlan
from ftjax.models.proj import Path, Site, put, site_names
from ftjax.weights import Delta

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
HASH_KEY = "ftjax_base_hash"
_PICKLE = "adapter_model.bin"
MAGNITUDE = "magnitude_vector"
_KEY = re.compile(
    re.escape(PREFIX) + rf"(.+)\.lora_(?:([AB])\.weight|({MAGNITUDE})(?:\.weight)?)"
)


# What every adapter of ours says beside its plan.
FIXED: dict[str, Any] = {
    "auto_mapping": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_type": "LORA",
    "revision": None,
    "task_type": "CAUSAL_LM",
}


@dataclass(frozen=True)
class Adapter:
    """What `load_adapter` found.

    Attributes:
      lora: the collection, float32, on the host.
      plan: its ranks and scales.
      base_name: of the model it was trained on, as it says.
      base_hash: of that model's weights, or None if another program wrote the adapter.
    """

    lora: Any
    plan: LoraPlan
    base_name: str
    base_hash: str | None


def save_adapter(
    folder: FilePath,
    lora: Any,
    plan: LoraPlan,
    base_name: str,
    base_hash: str | None,
    beside: Sequence[Entry] = (),
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter that PEFT loads over the transformers model.

    Args:
      folder: is made if it is missing; without an adapter in it yet.
      lora: the collection, as trained.
      plan: that it was made by; layers of rank 0 are left out.
      base_name: written as `base_model_name_or_path`.
      base_hash: of the base's weights, kept in the header of the tensors.
      beside: other tensors of the adapter.
      settings: what the configuration says of these.
    """
    entries = list(beside)
    for path, at in plan.sites.items():
        delta = _get(lora, path)["w"]
        a = np.asarray(delta.a, np.float32).reshape(
            len(at.ranks), math.prod(at.site.inputs), -1
        )
        b = np.asarray(delta.b, np.float32).reshape(
            len(at.ranks), -1, math.prod(at.site.outputs)
        )
        for layer, name in enumerate(site_names(at.site)):
            rank = at.ranks[layer]
            if rank:
                found = {
                    "A.weight": a[layer, :, :rank].T,
                    "B.weight": b[layer, :rank].T,
                }
                if delta.m is not None:
                    m = np.asarray(delta.m, np.float32).reshape(len(at.ranks), -1)
                    found[MAGNITUDE] = m[layer]
                for end, x in found.items():
                    key = f"{PREFIX}{name}.lora_{end}"
                    entries.append(Entry(key, x.shape, partial(np.asarray, x)))
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} | ({HASH_KEY: base_hash} if base_hash else {})
    write_tensors(folder / TENSORS, entries, np.dtype(np.float32), metadata)
    config = adapter_config(plan, base_name) | dict(settings or {})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def adapter_config(plan: LoraPlan, base_name: str) -> dict[str, Any]:
    """The `adapter_config.json` of a plan.

    The commonest rank and alpha are the defaults; whatever differs is in the patterns:
    under the projection's name where all its layers agree, else layer by layer. A name
    in full is a pattern that matches itself alone.
    """
    cells = {
        name: (rank, alpha)
        for at in plan.sites.values()
        for name, rank, alpha in zip(
            site_names(at.site), at.ranks, at.alphas, strict=True
        )
        if rank
    }
    rank = Counter(r for r, _ in cells.values()).most_common(1)[0][0]
    alpha = Counter(a for _, a in cells.values()).most_common(1)[0][0]
    targets: list[str] = []
    patterns: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for at in plan.sites.values():
        names = [name for name in site_names(at.site) if name in cells]
        whole = len(names) == len(at.ranks)
        short = at.site.path[-1]
        targets += [short] if whole else names
        for which, usual in enumerate((rank, alpha)):
            values = {name: cells[name][which] for name in names}
            if whole and len(set(values.values())) == 1:
                values = {short: values[names[0]]}
            patterns[which].update(
                {n: _number(v) for n, v in values.items() if v != usual}
            )
    return FIXED | {
        "alpha_pattern": patterns[1],
        "base_model_name_or_path": base_name,
        "lora_alpha": _number(alpha),
        "lora_dropout": plan.dropout,
        "r": rank,
        "rank_pattern": patterns[0],
        "target_modules": sorted(targets),
        "use_dora": any(at.dora for at in plan.sites.values()),
        "use_rslora": any(at.rslora for at in plan.sites.values()),
    }


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def load_adapter(
    folder: FilePath, sites: Mapping[Path, Site], others: Collection[str] = ()
) -> Adapter:
    """Reads an adapter for a model with these sites, but not its tensors `others`.

    Raises:
      UserError: naming the file, the config key or the tensor, for whatever is missing,
        left over, of another shape, or not computed by ftjax.
    """
    config = read_config(folder)
    where = folder / CONFIG
    tensors = read_tensors(folder)
    layers = named_layers(sites)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in others}
    rslora, dora = bool(config["use_rslora"]), bool(config["use_dora"])
    pairs = _pair(tensors, layers, folder, dora)
    check_targets(config, pairs, layers, where)

    def each(pattern: str, usual: str) -> dict[str, Any]:
        return {n: lookup(config[pattern], n, config[usual], where) for n in pairs}

    ranks, alphas = each("rank_pattern", "r"), each("alpha_pattern", "lora_alpha")
    for name, pair in pairs.items():
        _check_shapes(name, pair, layers[name], ranks[name])
    p = float(config["lora_dropout"])
    plans: dict[Path, SitePlan] = {}
    tree: dict[str, Any] = {}
    for path, site in sites.items():
        names = site_names(site)
        if any(name in pairs for name in names):
            rank = tuple(int(ranks.get(name, 0)) for name in names)
            alpha = tuple(float(alphas.get(name, 1.0)) for name in names)
            plans[path] = at = SitePlan(site, rank, alpha, rslora, dora)
            own = [pairs.get(name) for name in names]
            put(tree, path, {"w": _stack(at, own, p)})
    return Adapter(
        tree,
        LoraPlan(plans, p),
        str(config.get("base_model_name_or_path") or ""),
        read_metadata(folder / TENSORS).get(HASH_KEY),
    )


def named_layers(sites: Mapping[Path, Site]) -> dict[str, Site]:
    """The projections in the layers, by module name."""
    inner = [site for path, site in sites.items() if path[0] == "layers"]
    return {name: site for site in inner for name in site_names(site)}


def is_zero(lora: Any) -> bool:
    """Whether every `a` or `b` is zero, so that the adapter changes nothing.

    With magnitudes only the base could tell.
    """
    deltas = jax.tree.leaves(lora, is_leaf=lambda leaf: isinstance(leaf, Delta))
    return not any(
        d.m is not None or (bool(jnp.any(d.a != 0)) and bool(jnp.any(d.b != 0)))
        for d in deltas
    )


def read_tensors(folder: FilePath) -> dict[str, Tensor]:
    if not (folder / TENSORS).is_file():
        pickled = (folder / _PICKLE).is_file()
        raise UserError(
            "the adapter's weights are a pickle, which can run code and is never opened"
            if pickled
            else "the adapter has no weights",
            where=folder,
            expected=TENSORS,
            got=_PICKLE if pickled else None,
            fix="load it with PEFT in a place that you trust, and save_pretrained it",
        )
    return read_header(inside(folder, TENSORS, named_by=str(folder)))


def _pair(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Site],
    folder: FilePath,
    dora: bool,
) -> dict[str, dict[str, Tensor]]:
    """{module name: {'A': ..., 'B': ..., maybe MAGNITUDE: ...}}, nothing left over."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        name = match[1] if match else ""
        part = (match[2] or match[3]) if match else ""
        stray = not match or name not in layers or (part == MAGNITUDE and not dora)
        if stray or tensor.dtype not in FLOATS:
            raise UserError(
                "the adapter has a tensor that this model has no place for",
                where=f"{folder / TENSORS}: {key}",
                expected=f"{PREFIX}MODULE.lora_A.weight or .lora_B.weight, where MODULE"
                f" is such as\n{next(iter(layers))}",
                got=_what_is(key, name, layers, tensor),
                fix="pass the model that the adapter was trained on",
            )
        pairs.setdefault(name, {})[part] = tensor
    for name, pair in pairs.items():
        for part in _parts(dora):
            if part not in pair:
                raise UserError(
                    "a part of an update is missing",
                    where=f"{folder / TENSORS}: {_name(name, part)}",
                    expected=" and ".join(f"lora_{p}" for p in _parts(dora))
                    + " of every module",
                )
    if not pairs:
        raise UserError("the adapter is empty", where=folder / TENSORS)
    return pairs


def _parts(dora: bool) -> tuple[str, ...]:
    return ("A", "B", MAGNITUDE) if dora else ("A", "B")


def _name(module: str, part: str) -> str:
    """The key of a part of an update."""
    return f"{PREFIX}{module}.lora_{part}" + ("" if part == MAGNITUDE else ".weight")


def _what_is(key: str, name: str, layers: Mapping[str, Site], tensor: Tensor) -> str:
    if "magnitude" in key:
        return "a DoRA magnitude, where the configuration says use_dora=false"
    if "lora_embedding" in key or "embed_tokens" in key or "lm_head" in key:
        return "an update of the embedding or the head, which is not supported"
    if name in layers:
        return f"a tensor of dtype {tensor.dtype}"
    if not key.startswith(PREFIX):
        return f"a name without the prefix {PREFIX}"
    return f"a module that is not in the model: {name or key}"


def _check_shapes(name: str, pair: dict[str, Tensor], site: Site, rank: int) -> None:
    shapes = {
        "A": (rank, math.prod(site.inputs)),
        "B": (math.prod(site.outputs), rank),
        MAGNITUDE: (math.prod(site.outputs),),
    }
    for part, tensor in pair.items():
        if tensor.shape != shapes[part]:
            raise UserError(
                "a tensor of the adapter has the wrong shape",
                where=f"{tensor.file}: {_name(name, part)}",
                expected=f"{list(shapes[part])} (rank {rank})",
                got=str(list(tensor.shape)),
                fix="pass the model that the adapter was trained on, with its own "
                f"{CONFIG}",
            )


def _stack(at: SitePlan, pairs: list[dict[str, Tensor] | None], p: float) -> Delta:
    site, rank = at.site, at.rank
    a = np.zeros((len(pairs), math.prod(site.inputs), rank), np.float32)
    b = np.zeros((len(pairs), rank, math.prod(site.outputs)), np.float32)
    m = np.zeros((len(pairs), *site.outputs), np.float32)
    for layer, pair in enumerate(pairs):
        if pair is not None:
            r = at.ranks[layer]
            a[layer, :, :r] = finite(pair["A"]).T
            b[layer, :r] = finite(pair["B"]).T
            if at.dora:
                m[layer] = finite(pair[MAGNITUDE]).reshape(site.outputs)
    leaves: dict[str, Any] = {
        "a": a.reshape(-1, *site.inputs, rank),
        "b": b.reshape(-1, rank, *site.outputs),
        "scale": np.asarray(at.scales, np.float32),
        "m": m if at.dora else None,
    }
    return Delta(**leaves, dropout=p)


def finite(tensor: Tensor) -> np.ndarray:
    values = tensor.read().astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(
            "the adapter holds values that are NaN or infinite",
            where=tensor.file,
            fix="use an adapter from before the run diverged",
        )
    return values


def read_metadata(path: FilePath) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return file.metadata() or {}


def _get(tree: Any, path: Path) -> Any:
    for name in path:
        tree = tree[name]
    return tree
