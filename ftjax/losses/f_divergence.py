"""f-DPO (arXiv 2309.16240): the score of a completion under other divergences than KL.

The score is f'(t) at t = p / p_ref, given x = log t; constants are those of TRL 1.16
(`DPOTrainer._compute_loss`). They cancel in the difference of two scores, but not where
each is divided by its own length. Only losses of the difference may use another score
than `reverse_kl`: the part of the reward that depends on the prompt cancels nowhere
else.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ftjax.losses.pairs import Scalar
from ftjax.weights import Array

# exp of this, squared, is still a float32 number; beyond it no gradient flows.
LARGEST = 40.0


def reverse_kl(x: Array, alpha: Scalar) -> Array:
    """log t: DPO itself."""
    return x


def forward_kl(x: Array, alpha: Scalar) -> Array:
    """1 - 1 / t."""
    return -jnp.expm1(jnp.minimum(-x, LARGEST))


def js_divergence(x: Array, alpha: Scalar) -> Array:
    """log (2 t / (t + 1))."""
    return math.log(2) + jax.nn.log_sigmoid(x)


def alpha_divergence(x: Array, alpha: Scalar) -> Array:
    """(t^(alpha - 1) - 1) / (alpha - 1); log t in the limit of alpha = 1."""
    power = jnp.asarray(alpha, x.dtype) - 1
    near = jnp.abs(power) < 1e-6
    safe = jnp.where(near, 1, power)
    return jnp.where(near, x, jnp.expm1(jnp.minimum(safe * x, LARGEST)) / safe)


SCORES: dict[str, Callable[[Array, Scalar], Array]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
