"""Kahneman-Tversky optimization (Ethayarajh et al., arXiv 2402.01306): no pairs needed.

    desirable:    lambda_D (1 - s(beta (x - z0)))
    undesirable:  lambda_U (1 - s(beta (z0 - x)))

x is log p / p_ref of a completion, a sum over its tokens, z0 the policy's divergence
from the reference, estimated on completions of other prompts; as in TRL 1.16, where the
loss is the mean over completions. All arrays have one value per completion, any shape.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.losses.pairs import Scalar
from ftjax.weights import Array


class Mean(NamedTuple):
    """Values of which the weighted mean is wanted."""

    value: Array
    weight: Array


def kto(
    ratio: Array,
    label: Array,
    z0: Array,
    *,
    beta: Scalar,
    desirable: Scalar = 1.0,
    undesirable: Scalar = 1.0,
) -> Array:
    """The loss of each completion.

    Args:
      ratio: log p / p_ref.
      label: bool, whether it is desirable.
      z0: [], of `reference_point`.
      beta: how steeply value saturates.
      desirable: lambda_D.
      undesirable: lambda_U.
    """
    up = desirable * jax.nn.sigmoid(beta * (z0 - ratio))
    down = undesirable * jax.nn.sigmoid(beta * (ratio - z0))
    return jnp.where(label, up, down)


def apo_zero_unpaired(
    ratio: Array,
    label: Array,
    *,
    beta: Scalar,
    desirable: Scalar = 1.0,
    undesirable: Scalar = 1.0,
) -> Array:
    """1 - s(b x) or s(b x): APO-zero (arXiv 2408.06266, eq. 7) of single completions.

    KTO whose z0 is 0: no completions of other prompts are needed.
    """
    weights = {"desirable": desirable, "undesirable": undesirable}
    return kto(ratio, label, jnp.zeros((), ratio.dtype), beta=beta, **weights)


def reference_point(mismatched: Array, real: Array) -> Array:
    """z0: max(0, mean log p / p_ref of completions of other prompts); no gradient.

    Args:
      mismatched: log p / p_ref of a prompt with the completion of another.
      real: bool, which slots hold one; 0 if none does.
    """
    total = jnp.sum(jnp.where(real, mismatched, 0))
    count = jnp.sum(real.astype(mismatched.dtype))
    mean = total / jnp.maximum(count, 1)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0))


def metrics(
    ratio: Array, logp: Array, label: Array, real: Array, *, beta: Scalar
) -> dict[str, Mean]:
    """Under TRL's names, each over the completions that it is about; no gradient.

    `rewards/margins` is the difference of the two means of `rewards`.
    """
    reward, logp = jax.lax.stop_gradient((beta * ratio, logp))
    chosen = (real & label).astype(reward.dtype)
    rejected = (real & ~label).astype(reward.dtype)
    return {
        "rewards/chosen": Mean(reward, chosen),
        "rewards/rejected": Mean(reward, rejected),
        "logps/chosen": Mean(logp, chosen),
        "logps/rejected": Mean(logp, rejected),
    }


def recommended(
    n_desirable: int, n_undesirable: int, desirable: float, undesirable: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(range for lambda_D given lambda_U, range for lambda_U given lambda_D).

    lambda_D n_D / (lambda_U n_U) should be in [1, 4/3] (eq. 8 of the paper): change one
    of the two weights, not both. Both counts must be above 0.
    """
    lowest, highest = 1.0, 4 / 3
    to_desirable = undesirable * n_undesirable / n_desirable
    to_undesirable = desirable * n_desirable / n_undesirable
    return (
        (lowest * to_desirable, highest * to_desirable),
        (to_undesirable / highest, to_undesirable / lowest),
    )
