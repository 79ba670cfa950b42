"""PPO with a value head on answers that were sampled; see `losses.ppo`.

The head is a collection of its own beside whatever a method trains, and reads the
policy's hidden states, so that there is no second model.
"""

from typing import Any

import jax.numpy as jnp

from ftjax.losses.policy import clipped
from ftjax.losses.ppo import value_loss
from ftjax.losses.sums import Sums, Term
from ftjax.methods.heads import read_head
from ftjax.models.decoder import Decoder
from ftjax.objectives.online import (
    old_and_reference,
    read,
    row_metrics,
    token_metrics,
)
from ftjax.step import Objective

PyTree = Any
VALUE = "value"  # the collection of the head


def ppo(model: Decoder, config: Any) -> Objective:
    """The clipped loss of every token, and the clipped loss of every value.

    Both are means over the tokens of the step. The rows bring what each state was
    worth when the answers were sampled, `old_value`, and what it should have been,
    `return` [rows, T].

    Args:
      model: of the policy.
      config: `loss` of `configs/ppo.py`: temperature, clip_low, clip_high, clip_value,
        value_weight, chunk.
    """
    clip = {"low": config.clip_low, "high": config.clip_high}

    def loss(policy: PyTree, frozen: PyTree, batch: PyTree, key: Any = None) -> Sums:
        del frozen
        hidden, tokens = read(model, policy, batch, config, key)
        weights = batch["weights"]
        old, _ = old_and_reference(tokens.logp_BT, batch)
        gain = clipped(tokens.logp_BT, old, batch["advantage"], **clip)
        value = read_head(hidden, policy[VALUE])
        error = value_loss(
            value, batch["old_value"], batch["return"], clip=config.clip_value
        )
        summed = jnp.sum(error * weights)
        terms = {
            "policy": jnp.sum(gain * weights),
            "value": config.value_weight * summed,
        }
        means, most = row_metrics(batch)
        means |= token_metrics(tokens, batch, **clip)
        means["value_loss"] = Term(summed, jnp.sum(weights))
        return Sums(terms, means, most)

    def trained(batch: PyTree) -> Any:
        return batch["weights"]

    return Objective(loss, {"policy": trained, "value": trained})
