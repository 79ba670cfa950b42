"""VeRA in PEFT's files: `vera_lambda_b` and `vera_lambda_d` of each module, one pair.

`vera_A` is [r, in] and `vera_B` [out, r], as wide as the widest module. They are always
written and always wanted: PEFT can draw them again from `projection_prng_key`, but with
torch's generator.
"""

import math
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from ftjax.checkpoints import peft
from ftjax.checkpoints.peft_config import refuse
from ftjax.checkpoints.peft_tensors import nothing_left, take
from ftjax.checkpoints.tensors import Tensor
from ftjax.errors import UserError
from ftjax.methods.vera import Target, pair_shapes
from ftjax.models.proj import Path, Site, put, site_names
from ftjax.models.vera import PAIR, Pair, Vera

A, B = "base_model.vera_A", "base_model.vera_B"
# Keys that change what is computed -> what is computed here.
FIXED: dict[str, Any] = {"bias": "none", "fan_in_fan_out": False}


def vera_out(
    collection: Any, sites: Mapping[Path, Site]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and configuration of a VeRA collection; idle layers are left out."""
    pair = collection[PAIR]
    tensors, targets, dropout = {}, [], 0.0
    for path, site in sites.items():
        leaf = _at(collection, path).get("w")
        if leaf is None:
            continue
        names = site_names(site)
        d = np.asarray(leaf.lambda_d, np.float32)
        b = np.asarray(leaf.lambda_b, np.float32).reshape(len(names), -1)
        live = [i for i in range(len(names)) if d[i].any() or b[i].any()]
        whole = len(live) == len(names)
        targets += [path[-1]] if whole else [names[i] for i in live]
        dropout = leaf.dropout
        for i in live:
            tensors[f"{peft.PREFIX}{names[i]}.vera_lambda_d"] = d[i]
            tensors[f"{peft.PREFIX}{names[i]}.vera_lambda_b"] = b[i]
    tensors[A] = np.ascontiguousarray(np.asarray(pair.a, np.float32).T)
    tensors[B] = np.ascontiguousarray(np.asarray(pair.b, np.float32).T)
    own: dict[str, Any] = {"r": pair.a.shape[1], "target_modules": sorted(targets)}
    own |= {"save_projection": True, "projection_prng_key": pair.key}
    own |= {"vera_dropout": dropout, "layers_to_transform": None}
    return tensors, own | {"layers_pattern": None}


def vera_in(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    sites: Mapping[Path, Site],
    where: FilePath,
) -> Any:
    """The collection, its pair among it.

    Raises:
      UserError: without its pair, or where it does not fit the model.
    """
    rank, dropout = config.get("r", 256), config.get("vera_dropout") or 0.0
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise refuse(where, "r", rank, "a positive number")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise refuse(where, "vera_dropout", dropout, "at least 0, below 1")
    if A not in tensors or B not in tensors:
        raise UserError(
            "the adapter has left out its random matrices: only torch draws them again",
            where=where.parent / peft.TENSORS,
            expected=f"{A} and {B}",
            got=f"save_projection={config.get('save_projection')!r}",
            fix="load it with PEFT, set save_projection=True in its config (the model "
            "must be made with it), and save_pretrained it",
        )
    folder, left = where.parent, dict(tensors)
    plan = _plan(config, tensors, sites, where)
    pair_a, pair_b = pair_shapes(plan, rank)
    pair = Pair(
        take(left, A, pair_a[::-1], folder).T,  # type: ignore[arg-type]
        take(left, B, pair_b[::-1], folder).T,  # type: ignore[arg-type]
        config.get("projection_prng_key") or 0,
    )
    tree: dict[str, Any] = {PAIR: pair}
    for path, at in plan.items():
        size = math.prod(at.site.outputs)
        d = np.zeros((len(at.layers), rank), np.float32)
        b = np.zeros((len(at.layers), size), np.float32)
        for i, name in enumerate(site_names(at.site)):
            if at.layers[i]:
                key = f"{peft.PREFIX}{name}.vera_lambda_"
                d[i] = take(left, f"{key}d", (rank,), folder)
                b[i] = take(left, f"{key}b", (size,), folder)
        b = b.reshape(-1, *at.site.outputs)
        leaf = Vera(d, b, at.site.inputs, float(dropout))  # type: ignore[arg-type]
        put(tree, path, {"w": leaf})
    nothing_left(left, folder)
    return tree


def _plan(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    sites: Mapping[Path, Site],
    where: FilePath,
) -> dict[Path, Target]:
    """What the tensors are for, which must be what the configuration targets."""
    layers = peft.named_layers(sites)
    end = ".vera_lambda_b"
    found = {key[len(peft.PREFIX) : -len(end)] for key in tensors if key.endswith(end)}
    found &= layers.keys()
    peft.check_targets(config, dict.fromkeys(found), layers, where)
    plan = {}
    for path, site in sites.items():
        hit = tuple(name in found for name in site_names(site))
        if any(hit):
            plan[path] = Target(site, hit)
    if not plan:
        raise UserError("the adapter is empty", where=where)
    return plan


def _at(tree: Any, path: Path) -> Any:
    for name in path:
        tree = tree.get(name, {})
    return tree
