"""Other models beside the policy: a reference that compares, a teacher that shows.

Where the base stands whole among what is frozen, it is the reference, in the step
itself. Otherwise (full fine-tuning, another checkpoint as reference, or because it is
asked for) two numbers per group take its place, computed once before the run: there is
never a second model in memory. A teacher is one, of its own size.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ftjax.console import say
from ftjax.data.loader import Loader
from ftjax.errors import UserError
from ftjax.loading import Base, load_base, open_base
from ftjax.models.decoder import Decoder
from ftjax.objectives.distill import TEACHER
from ftjax.objectives.dpo import REFERENCE
from ftjax.objectives.tasks import task_of
from ftjax.prepare import Prepared
from ftjax.sharding import batch_sharding, put_batch
from ftjax.step import Objective
from ftjax.weights import join

PyTree = Any
FOLDER = "reference"


def add_reference(
    config: Any, ready: Prepared, trained: PyTree, frozen: PyTree, workdir: Path
) -> None:
    """Puts the reference's log-probabilities beside the groups, where they are needed.

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
    task = task_of(config.task)
    if task.reference is None:
        return
    other, method = config.loss.reference, ready.shape.method
    if other == "base" and method.frozen_is_base and not config.loss.precompute:
        return
    if ready.data.loader is None:
        raise _of_a_stream()
    base = ready.base
    if other != "base":
        base = open_other(other, base, "config.loss.reference")
    model = Decoder(base.spec, dtype=ready.shape.dtype, mesh=ready.mesh)
    size = config.train.batch_size // config.train.accumulate
    loaders = {"train": ready.data.loader, "eval": ready.data.eval_loader}
    policy: PyTree | None = None
    for split, loader in loaders.items():
        if loader is None:
            continue
        path = workdir / FOLDER / f"{split}-{_key(config, base, loader)}.npy"
        if not path.is_file():
            if policy is None:
                policy = _variables(base, ready, trained, frozen)
            say(f"the reference reads the {split} data, once")
            say_of = partial(task.reference, model)
            _save(
                path,
                reference_sums(say_of, policy, loader, config.loss, ready.mesh, size),
            )
        put_reference(loader, np.load(path, allow_pickle=False))


def _of_a_stream() -> UserError:
    return UserError(
        "this reference reads all rows before the run; a stream has none yet",
        where="config.loss.reference, config.data.stream",
        expected="an adapter over its base as the reference, and precompute=False",
        fix="--config.data.stream=False",
    )


def make_objective(
    config: Any, ready: Prepared, frozen: PyTree
) -> tuple[Objective, PyTree]:
    """The objective of a run, and what is frozen: with the teacher, if it has one.

    Raises:
      UserError: a teacher with another vocabulary, or none at all.
    """
    task, model = task_of(config.task), ready.shape.model
    if task.guided is None:
        return task.make(model, config.loss), frozen
    if not config.loss.teacher:
        raise UserError(
            "there is no teacher",
            where="config.loss.teacher",
            expected="a checkpoint, a preset or a Hub name",
            fix="--config.loss.teacher=DIR",
        )
    other = open_other(config.loss.teacher, ready.base, "config.loss.teacher")
    weights = load_base(other, ready.shape.param_dtype, ready.mesh)
    teacher = Decoder(other.spec, dtype=ready.shape.dtype, mesh=ready.mesh)
    objective = task.guided(model, teacher, config.loss)
    return objective, {**frozen, TEACHER: weights}


def open_other(name: str, base: Base, key: str) -> Base:
    """Another checkpoint, as reference or teacher: it must know the same tokens.

    Raises:
      UserError: another vocabulary, or a tokenizer with other ids.
    """
    other = open_base(name)
    sizes = [one.spec.vocab_size for one in (base, other)]
    ids = [one.tokenizer.fingerprint() for one in (base, other)]
    if sizes[0] != sizes[1] or ids[0] != ids[1]:
        raise UserError(
            "the other model reads other tokens than the policy",
            where=f"config.model.path, {key}",
            expected=f"{base.name}: {sizes[0]:,} ids, tokenizer {ids[0][:12]}",
            got=f"{other.name}: {sizes[1]:,} ids, tokenizer {ids[1][:12]}",
            fix="take a model of the same family",
        )
    return other


def reference_sums(
    say_of: Callable[[PyTree, PyTree, Any], jax.Array],
    variables: PyTree,
    loader: Loader,
    loss: Any,
    mesh: Mesh,
    rows: int,
) -> np.ndarray:
    """log p of both members of every group: float32 [groups, 2].

    Args:
      say_of: (variables, batch, `loss`) -> [B, U, 2].
      variables: of the reference.
      loader: of the groups.
      loss: `config.loss` of the task.
      mesh: of the variables.
      rows: of a batch.
    """
    both = jax.jit(lambda variables, batch: say_of(variables, batch, loss))
    found = np.zeros((len(loader.dataset.groups), len(REFERENCE)), np.float32)
    for batch, members in loader.epoch_groups(rows):
        sums_BU2 = np.asarray(both(variables, put_batch(batch, batch_sharding(mesh))))
        for row, groups in enumerate(members):
            found[groups] = sums_BU2[row, : len(groups)]
    return found


def put_reference(loader: Loader, found: np.ndarray) -> None:
    """Puts the reference's sums, float32 [groups, 2], beside the groups."""
    for name, column in zip(REFERENCE, found.T, strict=True):
        loader.dataset.values[name] = column


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
        "ld_alpha": config.loss.get("ld_alpha", 1.0),
    }
    text = json.dumps(facts, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _save(path: Path, sums: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".partial")
    with unfinished.open("wb") as file:
        np.save(file, sums, allow_pickle=False)
    unfinished.replace(path)
