"""What the reference model says of each pair, computed once, before a run.

Where the base stands whole among what is frozen, it is the reference, in the step
itself. Otherwise (full fine-tuning, another checkpoint as reference, or because it is
asked for) two numbers per pair take its place: there is never a second model in memory.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ftjax.console import say
from ftjax.data.loader import Loader
from ftjax.errors import UserError
from ftjax.loading import Base, load_base, open_base
from ftjax.models.decoder import Decoder
from ftjax.objectives.dpo import REFERENCE, sums_of
from ftjax.objectives.rows import logps
from ftjax.objectives.tasks import task_of
from ftjax.prepare import Prepared
from ftjax.sharding import batch_sharding, put_batch
from ftjax.weights import join

PyTree = Any
FOLDER = "reference"


def add_reference(
    config: Any, ready: Prepared, trained: PyTree, frozen: PyTree, workdir: Path
) -> None:
    """Puts the reference's log-probabilities beside the pairs, where a step needs them.

    They are kept in the run's folder, named by what they depend on: the reference, the
    tokens of the data (so its template too) and how they are summed.

    Args:
      config: of the run.
      ready: what it prepared; its data gains the numbers.
      trained: at the start of the run, before a step.
      frozen: the rest of the base.
      workdir: of the run.

    Raises:
      UserError: another reference with another vocabulary or tokenizer.
    """
    if not task_of(config.task).reference:
        return
    other, method = config.loss.reference, ready.shape.method
    if other == "base" and method.frozen_is_base and not config.loss.precompute:
        return
    base = ready.base if other == "base" else open_reference(other, ready.base)
    data = ready.data
    loaders = {"train": data.loader, "eval": data.eval_loader}
    size = config.train.batch_size // config.train.accumulate
    policy: PyTree | None = None
    for split, loader in loaders.items():
        if loader is None:
            continue
        path = workdir / FOLDER / f"{split}-{_key(config, base, loader)}.npy"
        if path.is_file():
            found = np.load(path, allow_pickle=False)
        else:
            if policy is None:
                policy = _variables(base, ready, trained, frozen)
            say(f"the reference reads the {split} data, once")
            model = Decoder(base.spec, dtype=ready.shape.dtype, mesh=ready.mesh)
            found = reference_sums(model, policy, loader, config.loss, ready.mesh, size)
            path.parent.mkdir(exist_ok=True)
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, found, allow_pickle=False)
            partial.replace(path)
        put_reference(loader, found)


def open_reference(name: str, base: Base) -> Base:
    """Another checkpoint as reference: it must know the same tokens.

    Raises:
      UserError: another vocabulary, or a tokenizer with other ids.
    """
    other = open_base(name)
    sizes = [one.spec.vocab_size for one in (base, other)]
    ids = [one.tokenizer.fingerprint() for one in (base, other)]
    if sizes[0] != sizes[1] or ids[0] != ids[1]:
        raise UserError(
            "the reference model reads other tokens than the policy",
            where="config.model.path, config.loss.reference",
            expected=f"{base.name}: {sizes[0]:,} ids, tokenizer {ids[0][:12]}",
            got=f"{other.name}: {sizes[1]:,} ids, tokenizer {ids[1][:12]}",
            fix="take a reference of the same family, or loss.reference=base",
        )
    return other


def _variables(base: Base, ready: Prepared, trained: PyTree, frozen: PyTree) -> PyTree:
    """The policy as it starts, or another checkpoint's weights."""
    if base is not ready.base:
        return load_base(base, ready.shape.param_dtype, ready.mesh)
    return join(frozen, trained)


def _key(config: Any, base: Base, loader: Loader) -> str:
    facts = {
        "base": base.hash,
        "own": config.loss.reference == "base",
        "quant": config.quant.to_dict(),
        "init": [config.method.to_dict(), config.seed],
        "dtype": config.model.dtype,
        "data": loader.dataset.fingerprint(),
        "ld_alpha": config.loss.ld_alpha,
    }
    text = json.dumps(facts, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def reference_sums(
    model: Decoder, variables: PyTree, loader: Loader, loss: Any, mesh: Mesh, rows: int
) -> np.ndarray:
    """log p of the chosen and the rejected of every group: float32 [groups, 2].

    Args:
      model: the reference's.
      variables: its weights.
      loader: of the pairs.
      loss: `config.loss` of the task.
      mesh: of the weights.
      rows: of a batch.
    """

    @jax.jit
    def both(variables: PyTree, batch: PyTree) -> jax.Array:
        tokens = logps(model, variables, batch, loss.chunk)
        return jnp.stack(sums_of(tokens, batch, loss.ld_alpha), -1)

    found = np.zeros((len(loader.dataset.groups), len(REFERENCE)), np.float32)
    for batch, members in loader.epoch_groups(rows):
        sent = put_batch(batch, batch_sharding(mesh))
        sums_BU2 = np.asarray(both(variables, sent))
        for row, groups in enumerate(members):
            found[groups] = sums_BU2[row, : len(groups)]
    return found


def put_reference(loader: Loader, found: np.ndarray) -> None:
    """Puts the reference's sums, float32 [groups, 2], beside the pairs."""
    for name, column in zip(REFERENCE, found.T, strict=True):
        loader.dataset.values[name] = column
