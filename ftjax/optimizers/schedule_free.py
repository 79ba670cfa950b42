"""Schedule-free learning (arXiv 2405.15682): an average of weights, and no schedule.

    y = x + (1 - b1) (z - x)        where the gradient is taken
    z' = z - rate * step(y)         what the inner optimizer moves
    x' = x + c (z' - x)             the average; c = rate^2 / the sum of all rate^2

The weights of the run are x: what is evaluated, sampled, saved and exported is always
the average, and only the gradient asks for y. optax's version keeps y and takes x from
it by division; it also weighs each z with the rate of the step after it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class ScheduleFreeState(NamedTuple):
    steps: jax.Array  # int32 []
    total: jax.Array  # float32 [], the sum of the squared rates
    b1: jax.Array  # float32 []
    z: PyTree
    inner: PyTree


def schedule_free(
    inner: optax.GradientTransformation, rate: optax.Schedule, b1: float
) -> optax.GradientTransformation:
    """Averages what `inner`, an optimizer without momentum, does at `rate`."""

    def init(params: PyTree) -> ScheduleFreeState:
        # A copy: the step is given both x and z to write over.
        z = jax.tree.map(jnp.copy, params)
        steps, total = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        start = jnp.asarray(b1, jnp.float32)
        return ScheduleFreeState(steps, total, start, z, inner.init(params))

    def update(
        grads: PyTree, state: ScheduleFreeState, params: PyTree
    ) -> tuple[PyTree, ScheduleFreeState]:
        y = gradient_point(state, params)
        moves, after = inner.update(grads, state.inner, y)
        z = optax.apply_updates(state.z, moves)
        weight = jnp.square(jnp.asarray(rate(state.steps), jnp.float32))
        total = state.total + weight
        updates = jax.tree.map(lambda z, x: weight / total * (z - x), z, params)
        steps = optax.safe_increment(state.steps)
        return updates, ScheduleFreeState(steps, total, state.b1, z, after)

    return optax.GradientTransformation(init, update)


def gradient_point(opt_state: PyTree, trained: PyTree) -> PyTree:
    """Where the gradient is taken: y, or `trained` under any other optimizer."""

    def is_ours(state: Any) -> bool:
        return isinstance(state, ScheduleFreeState)

    found = [s for s in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(s)]
    if not found:
        return trained
    (state,) = found
    # Exact where z is x, as for what is never trained.
    return jax.tree.map(lambda x, z: x + (1 - state.b1) * (z - x), trained, state.z)
