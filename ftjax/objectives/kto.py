"""KTO: answers that are rated one by one, against a reference; see `losses.kto`.

A group is an answer to its prompt, and the same prompt with another row's answer, from
which the divergence is estimated. That estimate is one number of a micro-batch (as in
TRL), so micro-batches are not quite one big batch here.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ftjax.errors import UserError
from ftjax.losses.kto import apo_zero_unpaired, kto, metrics, reference_point
from ftjax.losses.sums import Sums
from ftjax.models.decoder import Decoder
from ftjax.objectives import rows
from ftjax.objectives.dpo import REFERENCE
from ftjax.step import Objective
from ftjax.weights import Array

PyTree = Any
TYPES = ("kto", "apo_zero_unpaired")


def rated(model: Decoder, config: Any) -> Objective:
    """The mean of the loss over the answers of a step.

    Args:
      model: of the policy and, where the rows bring no reference, of that too.
      config: `loss` of `configs/kto.py`: type ('kto', 'apo_zero_unpaired'), beta,
        desirable_weight, undesirable_weight.

    Raises:
      UserError: there is no such loss.
    """
    if config.type not in TYPES:
        raise UserError(
            "there is no such loss of rated answers",
            where="config.loss.type",
            expected=", ".join(TYPES),
            got=config.type,
        )
    weights = {
        "desirable": config.desirable_weight,
        "undesirable": config.undesirable_weight,
    }

    def loss(policy: PyTree, frozen: PyTree, batch: PyTree, key: Any = None) -> Sums:
        there = batch["rated"]
        real, label = there > 0, batch["label"] > 0
        own = answer_sums(model, policy, batch, config.chunk, key)
        if REFERENCE[0] in batch:
            reference = jnp.stack([batch[name] for name in REFERENCE], -1)
        else:
            base = rated_logps(model, frozen, batch, config)
            reference = jax.lax.stop_gradient(base)
        ratio_BU, mismatched_BU = jnp.moveaxis(own - reference, -1, 0)
        z0 = reference_point(mismatched_BU, real)
        if config.type == "kto":
            each = kto(ratio_BU, label, z0, beta=config.beta, **weights)
        else:
            each = apo_zero_unpaired(ratio_BU, label, beta=config.beta, **weights)
        told = metrics(ratio_BU, own[..., 0], label, real, beta=config.beta)
        means = {name: rows.mean(*parts) for name, parts in told.items()}
        means["kl"] = rows.mean(z0, there)
        return Sums({"rated": jnp.sum(each * there)}, means, {})

    return Objective(loss, {"rated": lambda batch: batch["rated"]})


def rated_logps(model: Decoder, variables: PyTree, batch: PyTree, config: Any) -> Array:
    """As `answer_sums`, of a reference."""
    return answer_sums(model, variables, batch, config.chunk)


def answer_sums(
    model: Decoder, variables: PyTree, batch: PyTree, chunk: int, key: Any = None
) -> Array:
    """log p of each answer, and of the other row's after the same prompt: [B, U, 2]."""
    tokens = rows.logps(model, variables, batch, chunk, key)
    real_BU = batch["rated"]
    both = rows.member_sums(tokens.logp_BT, batch, real_BU.shape[-1])
    return jnp.where(real_BU[..., None] > 0, both, 0)
