"""Runs steps: batches in, metrics out, the device never waiting for the host."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ftjax.data.loader import Batch, Loader
from ftjax.sharding import batch_sharding, put_batch, replicated
from ftjax.step import Objective, TrainState, compile_lean, make_train_step

PyTree = Any
DEVICES = "devices"  # the axis of `map_step`
# (step, the state before it) -> its batch, leaves [k, rows, ...], k micro-batches; None
# where no rows are left.
Source = Callable[[int, TrainState], Batch | None]


def stored_rows(loader: Loader, rows: int, k: int, devices: int = 0) -> Source:
    """The batches of a data set: a function of the step alone.

    Args:
      loader: of the rows.
      rows: of an optimizer step.
      k: micro-batches that it is cut into.
      devices: above 0, each of these into so many parts (see `map_step`).
    """

    def batch(step: int, state: TrainState) -> Batch:
        del state
        return micro_batches(loader.batch(step * rows, rows), k, devices)

    return batch


def micro_batches(batch: Batch, k: int, devices: int = 0) -> Batch:
    """Rows [k * n, ...] as k micro-batches [k, n, ...]; with devices [k, d, n / d]."""
    split = (k, devices, -1) if devices else (k, -1)
    return {n: x.reshape(*split, *x.shape[1:]) for n, x in batch.items()}


def run_steps(
    step_fn: Any,
    state: TrainState,
    frozen: PyTree,
    source: Source,
    steps: int,
    mesh: Mesh,
    pause: Callable[[int], bool],
) -> Iterator[tuple[int, dict[str, Any], TrainState | None]]:
    """(step, values, state) of each step; the state only where `pause(step)`.

    Elsewhere a step's values are read after the next one has been sent off, so that
    the device never waits for the host. Where the source has no more rows the last
    step's values come with the state, unless they have come already.
    """
    step = int(state.step)
    sharding = batch_sharding(mesh, leading=1)
    waiting: dict[str, Any] | None = None
    while step < steps:
        batch = source(step, state)
        if batch is None:
            break
        row_tokens = int((batch["segments"] > 0).sum())
        state, metrics = step_fn(state, frozen, put_batch(batch, sharding))
        if waiting:
            yield step, to_host(waiting), None
        step += 1
        waiting = {**metrics, "row_tokens": row_tokens}
        if pause(step):
            yield step, to_host(waiting), state
            waiting = None
    if waiting:
        yield step, to_host(waiting), state


def compile_step(objective: Objective, tx: Any, state: TrainState) -> Any:
    """The jitted step; the state is given up to it, and keeps its shardings."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(objective, tx)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return compile_lean(jitted)


def map_step(objective: Objective, tx: Any, state: TrainState) -> Any:
    """The step by `pmap`: every device has all weights, and a part of the rows.

    State and weights go in and come out as they are, replicated, so that nothing else
    of a run knows of it; batches are [k, devices, rows, ...].
    """
    del state
    step = make_train_step(objective, tx, DEVICES)
    mapped = jax.pmap(
        step, DEVICES, in_axes=(None, None, 1), out_axes=None, donate_argnums=0
    )
    return compile_lean(mapped)


# By `config.parallel`.
STEPS: dict[str, Callable[[Objective, Any, TrainState], Any]] = {
    "jit": compile_step,
    "pmap": map_step,
}


def on_mesh(state: TrainState, mesh: Mesh) -> TrainState:
    """Replicates what has no place on the mesh yet: counters and keys."""

    def place(leaf: jax.Array) -> jax.Array:
        known = isinstance(leaf.sharding, NamedSharding)
        return leaf if known else jax.device_put(leaf, replicated(mesh))

    return jax.tree.map(place, state)


def to_host(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics as Python numbers; waits for them."""
    found = {name: np.asarray(value).item() for name, value in metrics.items()}
    # A metric that no row of the step says anything about is not one.
    always = ("loss", "grad_norm")
    return {k: x for k, x in found.items() if k in always or not math.isnan(x)}


class Clock:
    """Speed and time left, from the steps alone: not compiling, evaluating, saving."""

    def __init__(self, steps: int, before: float = 0.0):
        """`steps` are to come; `before` seconds were spent before a resume."""
        self.steps, self.done, self.spent = steps, 0, 0.0
        self.last = time.monotonic()
        self.began = self.last - before

    def tick(self, tokens: int) -> float:
        """Tokens per second of the step that has just ended."""
        now = time.monotonic()
        took, self.last = max(now - self.last, 1e-9), now
        self.done += 1
        if self.done > 1:  # the first step compiles
            self.spent += took
        return tokens / took

    def restart(self) -> None:
        """Begins the next step's time now."""
        self.last = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float | None:
        """Seconds that the remaining steps will take; None until one was timed."""
        if self.done < 2:
            return None
        return (self.steps - self.done) * self.spent / (self.done - 1)
