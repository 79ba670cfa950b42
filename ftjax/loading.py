"""Opens a base: a model folder, checked before a weight is read; then its weights."""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax.checkpoints.heads import NAME, read_head, without_logits
from ftjax.checkpoints.hf import (
    Weights,
    find_model,
    load_params,
    open_weights,
    read_config,
)
from ftjax.checkpoints.jsonfile import inside
from ftjax.checkpoints.peft_config import CONFIG as ADAPTER_CONFIG
from ftjax.data.tokenizer import FILES as TOKENIZER_FILES
from ftjax.data.tokenizer import Tokenizer, load_tokenizer
from ftjax.errors import UserError, require_regular
from ftjax.methods.heads import SCORE, head_part
from ftjax.methods.quant import Plan, abstract_quant, quant_axes, without
from ftjax.methods.residual import Change
from ftjax.models.config_reader import say
from ftjax.models.decoder import Decoder
from ftjax.models.names import Path as LeafPath
from ftjax.models.presets import PRESETS
from ftjax.models.proj import abstract_params, find_sites, params_axes, put
from ftjax.models.registry import is_reward, spec_from_config
from ftjax.models.spec import ModelSpec
from ftjax.quant.qtensor import QTensor
from ftjax.run_folder import is_run
from ftjax.sharding import shard_tree

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

    @property
    def pad_id(self) -> int | None:
        """A token that fills up a row and ends no answer; None if there is none."""
        known = (self.tokenizer.pad, self.config.get("pad_token_id"))
        good = [i for i in known if isinstance(i, int) and i >= 0]
        return next((i for i in good if i not in self.eos_ids), None)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the tensors as they are stored: names, shapes, bytes; read once.

        It does not depend on how the tensors are spread over files, nor on the dtype or
        the mesh that they are read to, so that a run, its adapter and a later use
        agree. Empty for a base without weights.
        """
        if self.weights is None:
            return ""
        tensors = self.weights.tensors | self.weights.unread
        if self.weights.head is not None:
            tensors[NAME] = self.weights.head

        def digest(name: str) -> str:
            tensor = tensors[name]
            content = hashlib.sha256(tensor.raw().data).hexdigest()
            return f"{name} {tensor.dtype} {tensor.shape} {content}\n"

        with ThreadPoolExecutor(4) as pool:
            lines = list(pool.map(digest, sorted(tensors)))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_base(
    path: str,
    revision: str = "main",
    chat_template: str = "",
    *,
    weights: bool = True,
    reward: bool = False,
    logits: bool = True,
    note: Note = say,
) -> Base:
    """Finds a model and checks its configuration, tensors, tokenizer and vocabulary.

    Args:
      path: 'base', a folder, a preset or a name on the Hub.
      revision: of a name on the Hub.
      chat_template: a Jinja file instead of the tokenizer's own.
      weights: whether there must be weights; a run from scratch needs none.
      reward: whether a reward model will do: it has a score, and no logits.
      logits: whether they are asked for; if not, an output head that is no embedding
        stays unread, though the base is the same one (`Base.hash`).
      note: told, once each, what is worth knowing about the files.

    Raises:
      UserError: naming the file, key or tensor that is wrong.
    """
    folder = find_model(path, revision)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        require_regular(inside(folder, name, named_by=str(folder)))
    config = _model_config(folder, path)
    spec = spec_from_config(config, str(folder / CONFIG), reward=reward, note=note)
    found = None
    if weights:
        stored = config.get("quantization_config")
        scorer = is_reward(config)
        found = open_weights(
            folder, spec, quantization=stored, reward=scorer, note=note
        )
        found = found if logits else found.without_logits()
        spec = found.spec
    elif not logits:
        spec = without_logits(spec)
    tokenizer = load_tokenizer(folder, chat_template)
    check_vocab(spec, tokenizer.vocab_size, str(folder))
    return Base(folder, path, config, spec, tokenizer, tokenizer.eos_ids, found)


def _model_config(folder: Path, name: str) -> dict[str, Any]:
    """The `config.json` of a model; says how to use what could be one and is none.

    Raises:
      UserError: for the folder of a run, or of an adapter; as `read_config`.
    """
    if not (folder / CONFIG).is_file() and (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            "this is an adapter, which goes on a model",
            where=name,
            expected="config.json, a tokenizer and weights",
            fix=f"--model=BASE --adapter={name}; or make a model of both: "
            f"python -m ftjax.export --model=BASE --adapter={name} --to=merged "
            "--out=DIR",
        )
    config = read_config(folder)
    if is_run(config):
        raise UserError(
            "this is the folder of a run, not of a model",
            where=name,
            expected="config.json, a tokenizer and weights",
            fix=f"--workdir={name} where a command has it; else make a model of it: "
            f"python -m ftjax.export --workdir={name} --to=merged --out=DIR",
        )
    return config


def check_vocab(spec: ModelSpec, tokenizer_size: int, where: str) -> None:
    """The embedding must have a row for every token; spare rows are fine.

    Args:
      tokenizer_size: one more than the largest token id.
      where: the model, named in the error.
    """
    if tokenizer_size > spec.vocab_size:
        raise UserError(
            "the tokenizer has more tokens than the model",
            where=where,
            expected=f"at most {spec.vocab_size:,} tokens (vocab_size)",
            got=f"{tokenizer_size:,} tokens",
            fix="use the tokenizer that was published with the model",
        )


def open_other(name: str, base: Base, key: str) -> Base:
    """Another checkpoint beside a base, as reference or teacher.

    Raises:
      UserError: it knows other tokens.
    """
    other = open_base(name)
    require_same_tokens(base, other, "other model", key)
    return other


def require_same_tokens(base: Base, other: Base, what: str, key: str) -> None:
    """Two models that look at the same ids must mean the same by them.

    Args:
      base: of the policy.
      other: the other model; `what` it is, for people.
      key: of the config, which names it.

    Raises:
      UserError: another vocabulary, or a tokenizer with other ids.
    """
    sizes = [one.spec.vocab_size for one in (base, other)]
    ids = [one.tokenizer.fingerprint() for one in (base, other)]
    if sizes[0] != sizes[1] or ids[0] != ids[1]:
        raise UserError(
            f"the {what} reads other tokens than the policy",
            where=f"config.model.path, {key}",
            expected=f"{base.name}: {sizes[0]:,} ids, tokenizer {ids[0][:12]}",
            got=f"{other.name}: {sizes[1]:,} ids, tokenizer {ids[1][:12]}",
            fix="take a model of the same family",
        )


def load_base(
    base: Base,
    dtype: Any,
    mesh: Mesh,
    *,
    dtypes: Mapping[LeafPath, str] | None = None,
    formats: Plan | None = None,
    changes: Mapping[tuple[str, ...], Change] | None = None,
    note: Note = say,
) -> dict[str, PyTree]:
    """{'params': ..., 'quant': ...}: on their devices, split by their logical axes.

    And 'score', the head of a reward model.

    Args:
      dtype: of what stays floating point.
      dtypes: of single leaves, by path, instead.
      formats: of the projections that are quantized while they are read; 'quant' is
        there if any are, or if the base is stored quantized.
      changes: of projections: what to keep, or quantize, in place of a weight.
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

    how = {"dtype": jnp.dtype(dtype).name, "dtypes": dtypes, "changes": changes}
    params = load_params(base.weights, put=place, formats=plan, note=note, **how)
    found = {"params": params}
    if plan:
        found = {"params": without(params, plan), "quant": quant}
    if base.weights.head is not None:
        found[SCORE] = place_head(read_head(base.weights.head, note), base.spec, mesh)
    return found


def place_head(head: Any, spec: ModelSpec, mesh: Mesh) -> PyTree:
    """The head of a reward model on its devices."""
    part = head_part(spec.d_model)
    return jax.device_put(head, shard_tree(part.shapes, part.axes, mesh))


def public_name(base: Base) -> str:
    """What another program can load the base by: its name on the Hub, or its folder."""
    if base.name in PRESETS:
        return PRESETS[base.name].hub
    on_hub = base.name != "base" and not Path(base.name).expanduser().is_dir()
    return base.name if on_hub else str(base.dir.absolute())


def stored_formats(base: Base) -> Plan:
    """Of the weights whose files hold codes."""
    return base.weights.formats if base.weights is not None else {}
