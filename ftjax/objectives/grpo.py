"""GRPO and its relatives on answers that were sampled; see `losses.grpo`."""

from typing import Any

import jax.numpy as jnp

from ftjax.errors import UserError
from ftjax.losses.grpo import ADVANTAGES, REDUCTIONS, token_loss
from ftjax.losses.sums import Sums
from ftjax.models.decoder import Decoder
from ftjax.objectives.online import (
    old_and_reference,
    read,
    row_metrics,
    token_metrics,
)
from ftjax.step import Objective

PyTree = Any


def grpo(model: Decoder, config: Any) -> Objective:
    """The clipped loss of every token, averaged as `config.type` says.

    The rows bring `share`, the weight of each token [rows, T], and `total` [rows],
    whose sum over the step is what the sum of all is divided by (`losses.grpo.Share`).

    Args:
      model: of the policy.
      config: `loss` of `configs/grpo.py`: temperature, clip_low, clip_high, beta,
        chunk, and `type` and `scale`, which the rows were made by.

    Raises:
      UserError: there is no such type or scale.
    """
    for name, known in (("type", REDUCTIONS), ("scale", ADVANTAGES)):
        if config[name] not in known:
            raise UserError(
                f"there is no such {name} of this loss",
                where=f"config.loss.{name}",
                expected=", ".join(known),
                got=config[name],
            )
    clip = {"low": config.clip_low, "high": config.clip_high}

    def loss(policy: PyTree, frozen: PyTree, batch: PyTree, key: Any = None) -> Sums:
        del frozen
        _, tokens = read(model, policy, batch, config, key)
        old, reference = old_and_reference(tokens.logp_BT, batch)
        each = token_loss(
            tokens.logp_BT,
            old,
            reference,
            batch["advantage"],
            beta=config.beta,
            **clip,
        )
        means, most = row_metrics(batch)
        means |= token_metrics(tokens, batch, **clip)
        return Sums({"policy": jnp.sum(each * batch["share"])}, means, most)

    return Objective(loss, {"policy": lambda batch: batch["total"]})
