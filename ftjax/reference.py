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

from ftjax.console import say, warn
from ftjax.data.loader import Loader
from ftjax.errors import Stopped, UserError
from ftjax.loading import Base, load_base
from ftjax.models.decoder import Decoder
from ftjax.objectives.distill import TEACHER
from ftjax.objectives.dpo import REFERENCE
from ftjax.objectives.tasks import task_of
from ftjax.prepare import Prepared
from ftjax.sharding import batch_sharding, put_batch
from ftjax.weights import join

PyTree = Any
FOLDER = "reference"


def add_reference(
    config: Any,
    ready: Prepared,
    trained: PyTree,
    frozen: PyTree,
    workdir: Path,
    stopping: Callable[[], bool] = lambda: False,
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
      stopping: whether the run is asked to stop.

    Raises:
      UserError: the rows come as a stream, which has not come yet.
    """
    task = task_of(config.task)
    if task.reference is None or not reads_before(config, ready):
        return
    base = ready.aim.reference or ready.base
    model = Decoder(base.spec, dtype=ready.shape.dtype, mesh=ready.mesh)
    size = config.train.batch_size // config.train.accumulate
    loaders = {"train": ready.data.loader, "eval": ready.data.eval_loader}
    policy: PyTree | None = None
    for split, loader in loaders.items():
        if loader is None:
            continue
        path = workdir / FOLDER / f"{split}-{_key(config, base, loader)}.npy"
        found = _kept(path, loader)
        if found is None:
            if policy is None:
                policy = _variables(base, ready, trained, frozen)
            say(f"the reference reads the {split} data, once")
            how = config.loss, ready.mesh, size, stopping
            found = reference_sums(partial(task.reference, model), policy, loader, *how)
            _save(path, found)
        put_reference(loader, found)


def reads_before(config: Any, ready: Prepared) -> bool:
    """Whether a reference reads the rows before the run, for want of one in the step.

    Raises:
      UserError: it does, and they come as a stream.
    """
    if task_of(config.task).reference is None:
        return False
    other, method = ready.aim.reference, ready.shape.method
    if other is None and method.frozen_is_base and not config.loss.precompute:
        return False
    if ready.data.loader is None:
        raise _of_a_stream()
    return True


def with_teacher(ready: Prepared, frozen: PyTree) -> PyTree:
    """What is frozen, with the weights of the teacher, if there is one."""
    teacher = ready.aim.teacher
    if teacher is None:
        return frozen
    weights = load_base(teacher, ready.shape.param_dtype, ready.mesh)
    return {**frozen, TEACHER: weights}


def _of_a_stream() -> UserError:
    return UserError(
        "this reference reads all rows before the run; a stream has none yet",
        where="config.loss.reference, config.data.stream",
        expected="an adapter over its base as the reference, and precompute=False",
        fix="--config.data.stream=False",
    )


def reference_sums(
    say_of: Callable[[PyTree, PyTree, Any], jax.Array],
    variables: PyTree,
    loader: Loader,
    loss: Any,
    mesh: Mesh,
    rows: int,
    stopping: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """log p of both members of every group: float32 [groups, 2].

    Args:
      say_of: (variables, batch, `loss`) -> [B, U, 2].
      variables: of the reference.
      loader: of the groups.
      loss: `config.loss` of the task.
      mesh: of the variables.
      rows: of a batch.
      stopping: whether to stop; looked at before each batch.

    Raises:
      Stopped: it was to stop.
    """
    both = jax.jit(lambda variables, batch: say_of(variables, batch, loss))
    found = np.zeros((len(loader.dataset.groups), len(REFERENCE)), np.float32)
    for batch, members in loader.epoch_groups(rows):
        if stopping():
            raise Stopped("stopped while the reference read the data: nothing is kept")
        sums_BU2 = np.asarray(both(variables, put_batch(batch, batch_sharding(mesh))))
        for row, groups in enumerate(members):
            found[groups] = sums_BU2[row, : len(groups)]
    return found


def put_reference(loader: Loader, found: np.ndarray) -> None:
    """Puts the reference's sums, float32 [groups, 2], beside the groups."""
    for name, column in zip(REFERENCE, found.T, strict=True):
        loader.dataset.values[name] = column


def _variables(base: Base, ready: Prepared, trained: PyTree, frozen: PyTree) -> PyTree:
    """The base without its update, or another checkpoint's weights.

    An update that was taken off the base (PiSSA) left something else: that base is read
    again. Others begin beside it, at zero or not (virtual tokens, LoftQ).
    """
    shape = ready.shape
    if base is not ready.base:
        return load_base(base, shape.param_dtype, ready.mesh)
    if shape.method.begin is not None:
        formats = shape.formats
        return load_base(base, shape.param_dtype, ready.mesh, formats=formats)
    weights = {name: x for name, x in trained.items() if name == "params"}
    return join(frozen, weights)


def _key(config: Any, base: Base, loader: Loader) -> str:
    facts = {
        "base": base.hash,
        "quant": config.quant.to_dict() if config.loss.reference == "base" else None,
        "dtype": [config.model.dtype, config.model.param_dtype],
        "data": loader.dataset.fingerprint(),
        "ld_alpha": config.loss.get("ld_alpha", 1.0),
    }
    text = json.dumps(facts, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _kept(path: Path, loader: Loader) -> np.ndarray | None:
    """What was saved there, unless it is damaged."""
    if not path.is_file():
        return None
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        warn(f"{path.name} is damaged ({error}): the reference is asked again")
        return None
    good = found.shape == (len(loader.dataset.groups), len(REFERENCE))
    return found if good and np.isfinite(found).all() else None


def _save(path: Path, sums: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".partial")
    with unfinished.open("wb") as file:
        np.save(file, sums, allow_pickle=False)
    unfinished.replace(path)
