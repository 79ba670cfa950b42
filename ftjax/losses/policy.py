"""What the losses of reinforcement learning share: clipped ratios, and KL estimates.

Each is a function of log-probabilities of what was sampled, per token or per sequence,
any shape; padding is zero and gives finite numbers.
"""

import jax
import jax.numpy as jnp

from ftjax.losses.pairs import Scalar
from ftjax.weights import Array

# exp of this times any advantage is a float32 number; beyond it no gradient flows.
LARGEST = 20.0


def ratio(logp: Array, old: Array) -> Array:
    """p / p_old, the importance of what the old policy sampled."""
    return jnp.exp(jnp.minimum(logp - old, LARGEST))


def clipped(
    logp: Array,
    old: Array,
    advantage: Array,
    *,
    low: Scalar,
    high: Scalar,
    most: Scalar = float("inf"),
) -> Array:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A): PPO (arXiv 1707.06347, eq. 7).

    Args:
      logp: under the policy that is trained.
      old: under the policy that sampled; no gradient.
      advantage: A; no gradient.
      low: how far the ratio may fall.
      high: how far it may rise: the same in PPO, more in DAPO (arXiv 2503.14476).
      most: above it a ratio counts no more where A is negative (TRL's `delta`,
        INTELLECT-2, arXiv 2505.07291).
    """
    old, advantage = jax.lax.stop_gradient((old, advantage))
    rho = ratio(logp, old)
    bounded = jnp.clip(rho, 1 - low, 1 + high)
    return -jnp.minimum(jnp.minimum(rho, most) * advantage, bounded * advantage)


def clip_metrics(
    logp: Array, old: Array, advantage: Array, *, low: Scalar, high: Scalar
) -> dict[str, Array]:
    """1 where the clip took the gradient away, under TRL's names; no gradient."""
    rho = jax.lax.stop_gradient(ratio(logp, old))
    under = (rho < 1 - low) & (advantage < 0)
    over = (rho > 1 + high) & (advantage > 0)
    return {
        "clip_ratio/low": under.astype(rho.dtype),
        "clip_ratio/high": over.astype(rho.dtype),
        "clip_ratio/region": (under | over).astype(rho.dtype),
    }


def k1(logp: Array, reference: Array) -> Array:
    """log p / p_ref: an unbiased estimate of KL(p, p_ref); it may be negative."""
    return logp - reference


def k3(logp: Array, reference: Array) -> Array:
    """p_ref / p - 1 - log p_ref / p: unbiased and never negative (Schulman, 2020)."""
    back = jnp.minimum(reference - logp, LARGEST)
    return jnp.expm1(back) - back
