"""Proximal policy optimization (arXiv 1707.06347) with a value head, for completions.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lambda A_{t+1}
    loss = -min(rho A, clip(rho) A) + vf_coef max((V - G)^2, (V_clip - G)^2) / 2

G = A + V of the policy that sampled, A whitened for the first term: the definitions of
TRL's former PPO trainer (1.10: kl_coef 0.05, clip 0.2, vf_coef 0.1, gamma 1, lambda
0.95) and of Ouyang et al. (arXiv 2203.02155). `policy` has the clip and the KL.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftjax.losses.pairs import Scalar
from ftjax.weights import Array


class Returns(NamedTuple):
    """Per token, 0 where there is none; neither carries a gradient."""

    advantage_BT: Array  # A, not whitened
    return_BT: Array  # G, what the value head should say


def token_rewards(score_BT: Array, kl_BT: Array, *, kl_coef: Scalar) -> Array:
    """What each token earns: its share of the score, less the price of its KL.

    Args:
      score_BT: the completion's score at its last token, 0 elsewhere.
      kl_BT: `policy.k1` or `policy.k3` under the policy that sampled; 0 elsewhere.
      kl_coef: the price.
    """
    return jax.lax.stop_gradient(score_BT - kl_coef * kl_BT)


def gae(
    rewards_BT: Array,
    values_BT: Array,
    mask_BT: Array,
    goes_on_BT: Array,
    *,
    gamma: Scalar,
    lam: Scalar,
) -> Returns:
    """Generalized advantage estimation (arXiv 1506.02438) along rows of completions.

    Rows may hold several completions: none sees the next.

    Args:
      rewards_BT: of each token.
      values_BT: the value of the state in which each token is chosen.
      mask_BT: bool, tokens of completions.
      goes_on_BT: bool, whether the next position is of the same completion.
      gamma: the discount.
      lam: lambda, 0 (one step) to 1 (the whole return).
    """
    values = jnp.where(mask_BT, jax.lax.stop_gradient(values_BT), 0)
    goes_on = (goes_on_BT & mask_BT).astype(values.dtype)
    after = jnp.roll(values, -1, axis=1)
    delta = jnp.where(mask_BT, rewards_BT + gamma * goes_on * after - values, 0)

    def join(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> Any:
        # A_t = delta_t + decay_t A_{t+1}, two spans of it made one.
        return earlier[0] + earlier[1] * later[0], earlier[1] * later[1]

    pieces = (delta, gamma * lam * goes_on)
    advantage, _ = jax.lax.associative_scan(join, pieces, reverse=True, axis=1)
    return Returns(*jax.lax.stop_gradient((advantage, advantage + values)))


def whiten(x: Array, mask: Array, *, shift: bool = True) -> Array:
    """Mean 0 and variance 1 over the masked elements; 0 elsewhere; no gradient.

    The variance has Bessel's correction and 1e-8 under its root. Without `shift` the
    mean stays.
    """
    x, weight = jax.lax.stop_gradient(x), mask.astype(x.dtype)
    count = jnp.sum(weight)
    mean = jnp.sum(x * weight) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.square(x - mean) * weight)
    variance = squares / jnp.maximum(count - 1, 1)
    white = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(mask, white if shift else white + mean, 0)


def value_loss(
    value: Array, old_value: Array, goal: Array, *, clip: Scalar = 0.2
) -> Array:
    """max((V - G)^2, (V_clip - G)^2) / 2, V_clip within `clip` of the old value."""
    old_value, goal = jax.lax.stop_gradient((old_value, goal))
    near = jnp.clip(value, old_value - clip, old_value + clip)
    return jnp.maximum(jnp.square(value - goal), jnp.square(near - goal)) / 2
