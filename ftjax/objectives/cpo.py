"""CPO and SimPO: pairs without a reference, and imitation; see `losses.cpo`."""

from typing import Any

import jax.numpy as jnp

from ftjax.errors import UserError
from ftjax.losses.cpo import LOSSES, Options, metrics
from ftjax.losses.pairs import Pairs
from ftjax.losses.sums import Sums, Term
from ftjax.models.decoder import Decoder
from ftjax.objectives import rows
from ftjax.step import Objective

PyTree = Any


def cpo(model: Decoder, config: Any) -> Objective:
    """A loss of each pair, and `nll_weight` times the NLL of the chosen answers.

    Args:
      model: of the policy; there is no reference.
      config: `loss` of `configs/cpo.py` or `configs/simpo.py`.

    Raises:
      UserError: there is no such loss.
    """
    if config.type not in LOSSES:
        raise UserError(
            "there is no such loss of pairs",
            where="config.loss.type",
            expected=", ".join(LOSSES),
            got=config.type,
        )
    options = Options(
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        gamma=config.gamma,
        alpha=config.alpha,
    )

    def loss(policy: PyTree, frozen: PyTree, batch: PyTree, key: Any = None) -> Sums:
        del frozen
        tokens = rows.logps(model, policy, batch, config.chunk, key)
        own = rows.pair_sums(tokens.logp_BT, batch)
        none = jnp.zeros_like(own[0])
        lengths = rows.pair_sums(batch["weights"], batch)
        pairs = Pairs(*own, none, none, *lengths)
        each = LOSSES[config.type](pairs, options) * batch["pair"]
        nll = -jnp.sum(tokens.logp_BT * rows.chosen_weights(batch))
        terms = {"preference": jnp.sum(each), "nll": config.nll_weight * nll}
        means = rows.means(metrics(pairs, options, config.type), batch["pair"])
        means["nll"] = Term(nll, jnp.sum(rows.chosen_weights(batch)))
        return Sums(terms, means | rows.side_metrics(tokens, batch), {})

    over = {"preference": lambda batch: batch["pair"], "nll": rows.chosen_weights}
    return Objective(loss, over)
