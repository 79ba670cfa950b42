"""Group relative policy optimization (DeepSeekMath, arXiv 2402.03300), and relatives.

    A_i = (R_i - mean R) / (std R + 1e-4)  over the completions of one prompt
    loss of a token = -min(rho A, clip(rho) A) + beta k3

as in TRL 1.16. `policy` has the ratio, its clip and k3; advantages and the ways in
which tokens are averaged are here.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from ftjax.losses import policy
from ftjax.losses.pairs import Scalar
from ftjax.weights import Array

EPSILON = 1e-4


def token_loss(
    logp: Array,
    old: Array,
    reference: Array,
    advantage: Array,
    *,
    beta: Scalar,
    low: Scalar = 0.2,
    high: Scalar = 0.2,
) -> Array:
    """The loss of each token, any shape; `advantage` is its completion's.

    Args:
      logp: under the policy that is trained.
      old: under the policy that sampled.
      reference: under the reference; where beta is 0 it may be `old`.
      advantage: of the completion, the same shape.
      beta: the weight of k3; 0 in TRL.
      low: of the clip.
      high: of the clip.
    """
    gain = policy.clipped(logp, old, advantage, low=low, high=high)
    return gain + beta * policy.k3(logp, reference)


def centered(rewards_PG: Array, real_PG: Array) -> Array:
    """R - mean of the group: the advantages of Dr. GRPO (arXiv 2503.20783).

    Args:
      rewards_PG: of G completions for each of P prompts.
      real_PG: bool; what is not real counts nowhere and gets 0.
    """
    mean = _mean(rewards_PG, real_PG, axis=1)
    return jnp.where(real_PG, rewards_PG - mean, 0)


def group_scaled(rewards_PG: Array, real_PG: Array) -> Array:
    """`centered`, over the group's standard deviation (with Bessel's correction)."""
    deviation = _deviation(rewards_PG, real_PG, axis=1)
    return centered(rewards_PG, real_PG) / (deviation + EPSILON)


def batch_scaled(rewards_PG: Array, real_PG: Array) -> Array:
    """`centered`, over the standard deviation of all rewards (arXiv 2508.08221)."""
    deviation = _deviation(rewards_PG, real_PG, axis=None)
    return centered(rewards_PG, real_PG) / (deviation + EPSILON)


def leave_one_out(rewards_PG: Array, real_PG: Array) -> Array:
    """R_i less the mean of the others: RLOO (arXiv 2402.14740); sums to 0 per group.

    A completion that has no others gets 0.
    """
    count = jnp.sum(real_PG.astype(rewards_PG.dtype), axis=1, keepdims=True)
    factor = count / jnp.maximum(count - 1, 1)
    return jnp.where(count > 1, centered(rewards_PG, real_PG) * factor, 0)


# Under TRL's names for `scale_rewards`; `leave_one_out` is that of its RLOO trainer.
ADVANTAGES: dict[str, Callable[[Array, Array], Array]] = {
    "group": group_scaled,
    "batch": batch_scaled,
    "none": centered,
    "leave_one_out": leave_one_out,
}


class Share(NamedTuple):
    """How tokens are averaged: sum of `token * loss`, over the sum of `total`.

    Both sums run over the whole step, so that parts of a batch add up.
    """

    token: Array  # as the mask
    total: Array  # []


class Tokens(NamedTuple):
    """Which tokens a loss is over."""

    mask: Array  # float32, any shape: 1 at tokens of completions
    length: Array  # the same shape: the tokens of the completion that each belongs to
    completions: Array  # []: how many there are, empty ones too


def per_sequence(tokens: Tokens, longest: Scalar) -> Share:
    """The mean over completions of the mean over each one's tokens: GRPO."""
    share = tokens.mask / jnp.maximum(tokens.length, 1)
    return Share(share, _scalar(tokens.completions))


def per_batch(tokens: Tokens, longest: Scalar) -> Share:
    """The mean over the tokens of this array, which has a weight of 1: BNPO.

    Parts of a step weigh the same, however many tokens each has.
    """
    count = jnp.sum(tokens.mask)
    return Share(tokens.mask / jnp.maximum(count, 1), jnp.ones_like(count))


def per_budget(tokens: Tokens, longest: Scalar) -> Share:
    """The sum over (completions * the longest that one may be): Dr. GRPO."""
    return Share(tokens.mask, _scalar(tokens.completions) * longest)


def per_token(tokens: Tokens, longest: Scalar) -> Share:
    """The mean over all tokens of the step: DAPO, and TRL's default."""
    return Share(tokens.mask, jnp.sum(tokens.mask))


REDUCTIONS: dict[str, Callable[[Tokens, Scalar], Share]] = {
    "grpo": per_sequence,
    "bnpo": per_batch,
    "dr_grpo": per_budget,
    "dapo": per_token,
}


def _scalar(x: Array) -> Array:
    return jnp.asarray(x, jnp.float32)


def _mean(x: Array, real: Array, axis: int | None) -> Array:
    count = jnp.sum(real.astype(x.dtype), axis=axis, keepdims=True)
    total = jnp.sum(jnp.where(real, x, 0), axis=axis, keepdims=True)
    return total / jnp.maximum(count, 1)


def _deviation(x: Array, real: Array, axis: int | None) -> Array:
    """With Bessel's correction; 0 of fewer than two."""
    count = jnp.sum(real.astype(x.dtype), axis=axis, keepdims=True)
    away = jnp.where(real, x - _mean(x, real, axis), 0)
    squares = jnp.sum(jnp.square(away), axis=axis, keepdims=True)
    return jnp.sqrt(squares / jnp.maximum(count - 1, 1))
