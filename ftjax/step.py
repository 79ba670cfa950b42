"""One optimizer step as a pure function: `step(state, frozen, batch)`.

The loss returns sums; micro-batches and devices add sums; the division by the weight of
the whole step happens here, once. So k micro-batches are one big batch, whatever the
lengths of their rows.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ftjax import runtime
from ftjax.losses.causal_lm import Sums
from ftjax.optimizers.schedule_free import gradient_point
from ftjax.weights import Array, join

PyTree = Any
Loss = Callable[[PyTree, PyTree, Array], Sums]  # (variables, batch, key) -> Sums


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
    loss: Loss, tx: optax.GradientTransformation
) -> Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, Array]]]:
    """The step of a loss and an optimizer.

    `batch` leaves are [k, rows, ...]: k micro-batches, whose gradients are added up in
    float32. An update from a non-finite gradient, or from no trained token at all, is
    left out and counted in `state.skipped`.
    """

    def step(
        state: TrainState, frozen: PyTree, batch: PyTree
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        at = gradient_point(state.opt_state, state.trained)
        sums, grads = sum_micro_batches(loss, at, frozen, batch, key)
        weight = jnp.maximum(sums.weight, 1)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(sums.loss) & (sums.weight > 0)
        updates, opt_state = tx.update(grads, state.opt_state, state.trained)
        trained = jax.tree.map(_add, state.trained, updates)
        trained, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (trained, opt_state),
            (state.trained, state.opt_state),
        )
        skipped = jnp.where(good, 0, state.skipped + 1)
        metrics = {
            "loss": sums.loss / weight,
            "token_accuracy": sums.correct / weight,
            "weight": sums.weight,
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
        return compiled[shapes](state, frozen, batch)

    return run


def sum_micro_batches(
    loss: Loss, trained: PyTree, frozen: PyTree, batch: PyTree, key: Array
) -> tuple[Sums, PyTree]:
    """Sums and the gradient of the summed loss, over micro-batches [k, ...]."""

    def objective(trained: PyTree, micro: PyTree, key: Array) -> tuple[Array, Sums]:
        sums = loss(join(frozen, trained), micro, key)
        return sums.loss, sums

    grad = jax.value_and_grad(objective, has_aux=True)
    count = jax.tree.leaves(batch)[0].shape[0]
    if count == 1:
        (_, sums), grads = grad(trained, jax.tree.map(lambda x: x[0], batch), key)
        return sums, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    def body(total: Any, item: Any) -> tuple[Any, None]:
        index, micro = item
        (_, sums), grads = grad(trained, micro, jax.random.fold_in(key, index))
        return jax.tree.map(
            lambda t, x: t + x.astype(t.dtype), total, (sums, grads)
        ), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    nothing = Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields))
    total, _ = jax.lax.scan(body, (nothing, zeros), (jnp.arange(count), batch))
    return total
