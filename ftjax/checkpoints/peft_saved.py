"""Whole weights in PEFT's adapters: its `modules_to_save`, our `also_train`.

They stand beside the update, under their published names behind the usual prefix. PEFT
loads a tied head and its embedding apart from one another: both are written, and what
comes in with the two parted is refused, since here they are one weight.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np

from ftjax.checkpoints import peft
from ftjax.checkpoints.heads import NAME, head_entry, without_logits
from ftjax.checkpoints.hf_save import Host
from ftjax.checkpoints.peft_config import CONFIG, refuse
from ftjax.checkpoints.peft_tensors import take
from ftjax.checkpoints.tensors import Entry, Tensor
from ftjax.errors import UserError
from ftjax.models.names import Path, Weight, model_weights
from ftjax.models.spec import ModelSpec

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Saved = Mapping[str, np.ndarray]  # published name -> as stored
SEQ_CLS = "SEQ_CLS"  # the task of an adapter of a reward model
HEADS = ("classifier", "score")  # what PEFT saves of every model of that task


def module_of(name: str) -> str:
    """'lm_head.weight' -> 'lm_head'."""
    return name.rpartition(".")[0]


def saved_entries(params: Any, names: Collection[str], spec: ModelSpec) -> list[Entry]:
    """The weights of these published names, to be written; a tied head among them."""
    entries: list[Entry] = []
    for path, weight in model_weights(spec).items():
        wanted = [i for i, name in enumerate(weight.names) if name in names]
        if not wanted:
            continue
        host = Host(_at(params, path), weight)
        for i in wanted:
            name = weight.names[i]
            both = [name, HEAD] if spec.tied and name == EMBEDDING else [name]
            for key in both:
                place = f"{peft.PREFIX}{key}"
                entries.append(Entry(place, weight.stored_shape, host.reader(i)))
    return entries


def saved_config(entries: Collection[Entry], tie: bool = False) -> dict[str, Any]:
    """What the configuration says of them; the names are whole, to match once.

    With `tie` PEFT keeps a tied head tied; it knows how for LoRA alone.
    """
    if not entries:
        return {}
    names = [entry.name.removeprefix(peft.PREFIX) for entry in entries]
    modules = {"modules_to_save": sorted({module_of(name) for name in names})}
    return modules | ({"ensure_weight_tying": True} if tie and HEAD in names else {})


def scored_entries(
    head: Mapping[str, Any], params: Any, names: Collection[str], spec: ModelSpec
) -> list[Entry]:
    """The same of a reward model, which has a score in place of the logits' head."""
    body = without_logits(spec)
    own = {weight for path in model_weights(body).values() for weight in path.names}
    entries = saved_entries(params, own & set(names), replace(spec, tied=False))
    return [*entries, head_entry(head, peft.PREFIX)]


def take_head(
    config: Mapping[str, Any],
    left: dict[str, Tensor],
    spec: ModelSpec,
    folder: FilePath,
) -> tuple[dict[str, Any], ModelSpec, dict[str, np.ndarray] | None]:
    """The configuration, and the model, of the rest of an adapter; and its head.

    A reward model's adapter has the score whole, and nothing of the head of logits.

    Raises:
      UserError: there is none although its task is that of reward models, or it gives
        more than one number.
    """
    modules = config.get("modules_to_save")
    named = isinstance(modules, list) and "score" in modules
    if not named and config.get("task_type") != SEQ_CLS:
        return dict(config), spec, None
    w_1D = take(left, f"{peft.PREFIX}{NAME}", (1, spec.d_model), folder)
    rest = [m for m in modules if m not in HEADS] if isinstance(modules, list) else None
    return (
        {**config, "modules_to_save": rest},
        replace(spec, tied=False),
        {"w": w_1D[0]},
    )


def take_saved(
    config: Mapping[str, Any],
    left: dict[str, Tensor],
    spec: ModelSpec,
    folder: FilePath,
) -> dict[str, np.ndarray]:
    """The saved weights of an adapter; their tensors are no longer among those left.

    Raises:
      UserError: a module that the model has not, a tensor that is missing or of another
        shape, or an embedding that is parted from its tied head.
    """
    modules = config.get("modules_to_save")
    if not modules:
        return {}
    where = folder / CONFIG
    if not isinstance(modules, list) or not all(isinstance(m, str) for m in modules):
        raise refuse(where, "modules_to_save", modules, "a list of module names")
    weights = _by_name(spec)
    if spec.tied:
        weights[HEAD] = weights[EMBEDDING]
    for module in modules:
        if not any(_within(name, module) for name in weights):
            raise refuse(where, "modules_to_save", module, "modules of the model")
    names = [n for n in weights if any(_within(n, module) for module in modules)]
    if EMBEDDING in names and config.get("ensure_weight_tying"):
        names += [HEAD] if spec.tied and HEAD not in names else []
    saved = {
        name: take(left, f"{peft.PREFIX}{name}", weights[name].stored_shape, folder)
        for name in names
    }
    if spec.tied:
        _require_tied(saved, where)
        saved.pop(HEAD, None)
    return saved


def _within(name: str, module: str) -> bool:
    """Whether PEFT saves a weight for this entry: a module's name ends with it."""
    parts = module_of(name).split(".")
    return any(".".join(parts[:i]).endswith(module) for i in range(1, len(parts) + 1))


def _require_tied(saved: Saved, where: FilePath) -> None:
    both = [saved.get(name) for name in (EMBEDDING, HEAD)]
    if both[0] is None and both[1] is None:
        return
    if both[0] is None or both[1] is None or not np.array_equal(both[0], both[1]):
        raise UserError(
            "the adapter parts the embedding from the head, which are one weight here",
            where=f"{where}: modules_to_save",
            expected=f"{EMBEDDING} and {HEAD}, with the same values",
            got="other values"
            if len(saved.keys() & {EMBEDDING, HEAD}) == 2
            else "one alone",
            fix="train it with ensure_weight_tying=True, or over a base that is not "
            "tied (tie_word_embeddings=false, with a head of its own)",
        )


def with_saved(params: Any, saved: Saved, spec: ModelSpec, where: str) -> Any:
    """`params` with these weights in their places, dtypes and devices.

    Raises:
      UserError: where a weight is quantized.
    """
    for path, weight in model_weights(spec).items():
        found = {i: saved[n] for i, n in enumerate(weight.names) if n in saved}
        if found:
            leaf = _at(params, path)
            if leaf is None:
                raise UserError(
                    "the adapter has a weight of its own where the base is quantized",
                    where=where,
                    expected=f"a base whose {'.'.join(path[:-1])} is not quantized",
                    fix="use the base in 16 bits, or leave that weight as it is",
                )
            params = _placed(params, path, _filled(leaf, weight, found))
    return params


def _filled(leaf: Any, weight: Weight, found: Mapping[int, np.ndarray]) -> Any:
    """The leaf with some of its layers, or the whole of it, from a file."""
    host = np.array(leaf)
    for i, stored in found.items():
        value = stored.T if weight.inputs else stored
        host[i if weight.layers else ...] = value.reshape(weight.shape)
    return jax.device_put(host, leaf.sharding)


def _by_name(spec: ModelSpec) -> dict[str, Weight]:
    return {n: weight for weight in model_weights(spec).values() for n in weight.names}


def _at(tree: Any, path: Path) -> Any:
    for name in path:
        tree = tree.get(name) if tree is not None else None
    return tree


def _placed(tree: Any, path: Path, leaf: Any) -> Any:
    """The tree with another leaf at `path`."""
    head, *rest = path
    inner = _placed(tree[head], tuple(rest), leaf) if rest else leaf
    return {**tree, head: inner}
