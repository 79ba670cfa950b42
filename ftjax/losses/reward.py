"""The reward model of Bradley and Terry (1952), as in Ouyang et al. (arXiv 2203.02155).

    loss = -log s(R(x, y_w) - R(x, y_l) - margin) + center (R(x, y_w) + R(x, y_l))^2

The margin is that of Llama 2 (arXiv 2307.09288), the centering that of Eisenstein et
al. (arXiv 2312.09244); both as in TRL 1.16.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.losses.pairs import Scalar
from ftjax.weights import Array


def reward(
    chosen: Array, rejected: Array, *, margin: Scalar = 0.0, center: Scalar = 0.0
) -> Array:
    """The loss of each pair, of scalar rewards of any shape.

    Args:
      chosen: reward of the chosen completion.
      rejected: of the rejected one.
      margin: by how much the chosen one should be ahead; a number, or one per pair.
      center: keeps rewards around 0, which no difference can; 0.01 is recommended.
    """
    apart = -jax.nn.log_sigmoid(chosen - rejected - margin)
    return apart + center * jnp.square(chosen + rejected)


def metrics(chosen: Array, rejected: Array) -> dict[str, Array]:
    """Per pair, under TRL's names; `accuracy` is strict, and fair with ties at 1/2."""
    chosen, rejected = jax.lax.stop_gradient((chosen, rejected))
    ahead = (chosen > rejected).astype(chosen.dtype)
    level = (chosen == rejected).astype(chosen.dtype)
    return {
        "accuracy": ahead,
        "accuracy_fair": ahead + level / 2,
        "margin": chosen - rejected,
        "mean_reward": (chosen + rejected) / 2,
    }


def extremes(chosen: Array, rejected: Array, real: Array) -> tuple[Array, Array]:
    """(smallest, largest) reward of the slots where `real` is true."""
    low = jnp.where(real, jnp.minimum(chosen, rejected), jnp.inf)
    high = jnp.where(real, jnp.maximum(chosen, rejected), -jnp.inf)
    return jnp.min(low), jnp.max(high)


class Bins(NamedTuple):
    """Sums over pairs by the confidence of the model, [bins] each: they add up."""

    weight: Array
    confidence: Array  # weight * probability of the completion that is ranked first
    correct: Array  # weight where that is the chosen one; half of it at a tie


def calibration(margin: Array, weight: Array, bins: int = 10) -> Bins:
    """Sorts pairs by confidence s(|margin|), in [1/2, 1], into bins of equal width.

    Args:
      margin: reward of the chosen completion less that of the rejected one.
      weight: of each pair, the same shape; 0 where there is none.
      bins: how many.
    """
    confidence = jax.nn.sigmoid(jnp.abs(margin)).ravel()
    weight = weight.ravel()
    correct = (jnp.sign(margin).ravel() + 1) / 2
    place = jnp.floor((confidence - 0.5) * (2 * bins)).astype(jnp.int32)
    place = jnp.minimum(place, bins - 1)
    empty = jnp.zeros((bins,), weight.dtype)
    return Bins(
        empty.at[place].add(weight),
        empty.at[place].add(weight * confidence),
        empty.at[place].add(weight * correct),
    )


def calibration_error(bins: Bins) -> Array:
    """Expected calibration error (Guo et al., arXiv 1706.04599), in [0, 1].

    sum over bins of |confidence - accuracy| * share of the weight; 0 without pairs.
    """
    gap = jnp.sum(jnp.abs(bins.confidence - bins.correct))
    total = jnp.sum(bins.weight)
    return jnp.where(total > 0, gap / jnp.where(total > 0, total, 1), 0)
