"""One optimizer step as a pure function: `step(state, frozen, batch)`.

A loss returns sums; micro-batches and devices add sums. What a term is divided by is
known from the data of the whole step, before any of it is computed, so every gradient
is that of the one mean. So k micro-batches are one big batch, whatever the lengths of
their rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ftjax import runtime
from ftjax.console import warn
from ftjax.losses.sums import Sums
from ftjax.optimizers.schedule_free import gradient_point
from ftjax.weights import Array, join

PyTree = Any
MANY_SHAPES = 4  # of batches, before somebody is told
# (policy, frozen, batch, key) -> Sums; without a key nothing is dropped out.
Loss = Callable[[PyTree, PyTree, PyTree, Array | None], Sums]
Totals = dict[str, Array]


@dataclass(frozen=True)
class Objective:
    """A loss, and what each of its terms is divided by.

    Attributes:
      loss: of one batch; the policy is what is frozen joined with what is trained.
      over: {term: weights of a batch}: a term's sum is divided by the sum of these over
        the whole step. They come of the data alone, whatever its leading axes.
      counts: {metric: weights of a batch}: their sums over the whole step, to be told.
    """

    loss: Loss
    over: Mapping[str, Callable[[PyTree], Array]]
    counts: Mapping[str, Callable[[PyTree], Array]] = field(default_factory=dict)

    def totals(self, batch: PyTree) -> Totals:
        """What each term is divided by, of a batch or of all the micro-batches."""
        return {term: jnp.sum(weights(batch)) for term, weights in self.over.items()}

    def counted(self, batch: PyTree) -> dict[str, Array]:
        """What is counted of a batch, or of all micro-batches: `trained` tokens too."""
        found = {name: jnp.sum(of(batch)) for name, of in self.counts.items()}
        trained = jnp.sum((batch["weights"] != 0).astype(jnp.float32))
        return {**found, "trained": trained}


def mean_loss(sums: Sums, totals: Totals) -> Array:
    """The sum of all terms, each divided; one that no row contributes to is 0."""
    parts = [
        sums.terms[k] / jnp.where(n > 0, n, 1).astype(sums.terms[k].dtype)
        for k, n in totals.items()
    ]
    return sum(parts[1:], parts[0])


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes."""

    step: Array  # int32 []
    trained: PyTree  # {collection: tree}
    opt_state: PyTree
    key: Array  # uint32 key data; dropout of step s draws from fold_in(key, s)
    skipped: Array  # int32 [], updates left out in a row: nothing to train on, or NaN


def init_state(
    trained: PyTree, tx: optax.GradientTransformation, seed: int
) -> TrainState:
    key = jax.random.key_data(jax.random.key(seed))
    # Two arrays, not one twice: each is donated to the step.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, trained, tx.init(trained), key, skipped)


def make_train_step(
    objective: Objective, tx: optax.GradientTransformation, axis: str | None = None
) -> Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, Array]]]:
    """The step of an objective and an optimizer.

    `batch` leaves are [k, rows, ...]: k micro-batches, whose gradients are added up in
    float32. An update from a non-finite gradient, or from no trained token at all, is
    left out and counted in `state.skipped`.

    Args:
      objective: what is minimised.
      tx: the optimizer.
      axis: a mapped axis over which the rows of a batch are split, and added up; None
        where one program has them all.
    """

    def step(
        state: TrainState, frozen: PyTree, batch: PyTree
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        at = gradient_point(state.opt_state, state.trained)
        totals, counts = objective.totals(batch), objective.counted(batch)
        if axis:
            totals, counts = jax.lax.psum((totals, counts), axis)
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        sums, grads = sum_micro_batches(objective, totals, at, frozen, batch, key)
        if axis:
            sums, grads = sums.over(axis), jax.lax.psum(grads, axis)
        loss, norm = mean_loss(sums, totals), optax.tree.norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(loss) & (sum(totals.values()) > 0)
        updates, opt_state = tx.update(grads, state.opt_state, state.trained)
        trained = jax.tree.map(_add, state.trained, updates)
        trained, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (trained, opt_state),
            (state.trained, state.opt_state),
        )
        skipped = jnp.where(good, 0, state.skipped + 1)
        metrics = {
            "loss": loss,
            **sums.metrics(),
            **counts,
            "grad_norm": norm,
            "skipped": skipped,
        }
        state = TrainState(state.step + 1, trained, opt_state, state.key, skipped)
        return state, metrics

    return step


def _add(weight: Array, update: Array) -> Array:
    """Their sum in the update's precision, then in the dtype of the weight."""
    return (weight.astype(update.dtype) + update).astype(weight.dtype)


def compile_lean(step: Any) -> Callable[[TrainState, PyTree, PyTree], Any]:
    """A jitted step that gives the compiler's memory back before it first runs.

    The most memory that a run takes is then that of the step, or of the compiler, and
    not of both together.
    """
    compiled: dict[Any, Any] = {}

    def run(state: TrainState, frozen: PyTree, batch: PyTree) -> Any:
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes not in compiled:
            compiled[shapes] = step.lower(state, frozen, batch).compile()
            runtime.release_memory()
            if len(compiled) % MANY_SHAPES == 0:
                last = ", ".join(sorted({str(shape) for shape in shapes}))
                warn(
                    f"the step was compiled for {len(compiled)} shapes of batches, "
                    f"each at a price: give all rows one length (last: {last})"
                )
        return compiled[shapes](state, frozen, batch)

    return run


def sum_micro_batches(
    objective: Objective,
    totals: Totals,
    trained: PyTree,
    frozen: PyTree,
    batch: PyTree,
    key: Array,
) -> tuple[Sums, PyTree]:
    """Sums and the gradient of the mean loss, over micro-batches [k, ...]."""

    def share(trained: PyTree, micro: PyTree, key: Array) -> tuple[Array, Sums]:
        sums = objective.loss(join(frozen, trained), frozen, micro, key)
        return mean_loss(sums, totals), sums

    grad = jax.value_and_grad(share, has_aux=True)
    count = jax.tree.leaves(batch)[0].shape[0]
    first = jax.tree.map(lambda x: x[0], batch)
    if count == 1:
        (_, sums), grads = grad(trained, first, key)
        return sums, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    def body(carry: Any, item: Any) -> tuple[Any, None]:
        total, grads = carry
        index, micro = item
        (_, sums), more = grad(trained, micro, jax.random.fold_in(key, index))
        grads = jax.tree.map(lambda t, x: t + x.astype(t.dtype), grads, more)
        return (total.add(sums), grads), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    shapes = jax.eval_shape(lambda: share(trained, first, key)[1])
    total, _ = jax.lax.scan(body, (nothing(shapes), zeros), (jnp.arange(count), batch))
    return total


def nothing(shapes: Sums) -> Sums:
    """The sums of no rows at all."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    least = {k: jnp.full(x.shape, -jnp.inf, x.dtype) for k, x in shapes.most.items()}
    return Sums(zeros.terms, zeros.means, least)
