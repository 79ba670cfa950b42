"""A chosen and a rejected completion of one prompt: what every pairwise loss reads."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.weights import Array

Scalar = float | Array


class Pairs(NamedTuple):
    """Of each pair; any shape, the same in every field; float32.

    A slot without a pair is zero in every field. Log-probabilities are sums over the
    completion's tokens, in nats.
    """

    chosen: Array  # log p(chosen | prompt) under the policy
    rejected: Array
    ref_chosen: Array  # the same under the reference
    ref_rejected: Array
    n_chosen: Array  # completion tokens
    n_rejected: Array

    @property
    def real(self) -> Array:
        """Bool: whether a slot holds a pair."""
        return self.n_chosen + self.n_rejected > 0

    @property
    def chosen_ratio(self) -> Array:
        """log p / p_ref of the chosen completion."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Array:
        """log p / p_ref of the rejected completion."""
        return self.rejected - self.ref_rejected


def per_token(total: Array, tokens: Array) -> Array:
    """The mean over tokens; 0 for an empty completion."""
    return total / jnp.maximum(tokens, 1)


def reward_metrics(
    chosen: Array, rejected: Array, noise: Scalar = 0.0
) -> dict[str, Array]:
    """Per pair, of the implicit rewards, under the names of TRL 1.16; no gradient.

    `rewards/accuracies` is strict: it is 0 where both rewards are the same, as they are
    before the first step. `rewards/accuracies_fair` counts a tie as one half.

    Args:
      chosen: reward of the chosen completion.
      rejected: of the rejected one.
      noise: rewards that differ by no more are the same.
    """
    chosen, rejected, noise = jax.lax.stop_gradient((chosen, rejected, noise))
    ahead = (chosen - rejected > noise).astype(chosen.dtype)
    level = (jnp.abs(chosen - rejected) <= noise).astype(chosen.dtype)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": ahead,
        "rewards/accuracies_fair": ahead + level / 2,
    }


def logp_metrics(chosen: Array, rejected: Array) -> dict[str, Array]:
    """Per pair, of the policy's log-probabilities, under TRL's names; no gradient."""
    chosen, rejected = jax.lax.stop_gradient((chosen, rejected))
    return {"logps/chosen": chosen, "logps/rejected": rejected}
