"""Distillation: a teacher's distribution over every token; see `losses.distill`."""

from typing import Any

import jax
import jax.numpy as jnp

from ftjax.errors import UserError
from ftjax.losses.distill import DIVERGENCES, Model, distill
from ftjax.losses.sums import Sums, Term
from ftjax.losses.token_logps import token_logps
from ftjax.models.decoder import Decoder, hidden_and_head
from ftjax.step import Objective

PyTree = Any
TEACHER = "teacher"  # a frozen collection: the variables of another model


def distilled(model: Decoder, teacher: Decoder, config: Any) -> Objective:
    """(1 - w) times the divergence from the teacher, and w times the likelihood.

    Args:
      model: the student.
      teacher: of the same vocabulary; its variables are `frozen['teacher']`.
      config: `loss` of `configs/distill.py`: divergence, beta, temperature, nll_weight
        (w) and chunk.

    Raises:
      UserError: there is no such divergence.
    """
    if config.divergence not in DIVERGENCES:
        raise UserError(
            "there is no such divergence",
            where="config.loss.divergence",
            expected=", ".join(DIVERGENCES),
            got=config.divergence,
        )

    def loss(policy: PyTree, frozen: PyTree, batch: PyTree, key: Any = None) -> Sums:
        student = hidden_and_head(model, policy, batch, key)
        known = hidden_and_head(teacher, frozen[TEACHER], batch)
        weights = batch["weights"]
        found = distill(
            Model(*student),
            Model(*known),
            weights,
            config.chunk,
            divergence=config.divergence,
            beta=config.beta,
            temperature=config.temperature,
        )
        apart = jnp.sum(found.loss_BT * weights)
        tokens = token_logps(*student, batch["targets"], weights, config.chunk)
        nll = -jnp.sum(tokens.logp_BT * weights)
        w, total = config.nll_weight, jnp.sum(weights)
        means = {
            "divergence": Term(apart, total),
            "nll": Term(nll, total),
            "entropy": Term(jnp.sum(found.entropy_BT * weights), total),
            "token_accuracy": Term(jnp.sum(tokens.correct_BT * weights), total),
        }
        means = jax.lax.stop_gradient(means)
        return Sums({"distill": (1 - w) * apart + w * nll}, means, {})

    return Objective(loss, {"distill": lambda batch: batch["weights"]})
