"""ORPO: imitation and a preference in one, without a reference; see `losses.orpo`.

The rows may be pairs, answers to imitate and plain text, in any mixture: each gives the
terms that it can. A pair gives the odds ratio and the likelihood of what is chosen, an
answer and a text their likelihood.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp

from ftjax.losses.orpo import metrics, odds_ratio
from ftjax.losses.pairs import per_token
from ftjax.losses.sums import Sums, Term
from ftjax.losses.token_logps import token_logps
from ftjax.models.decoder import Decoder, hidden_and_head
from ftjax.objectives import rows
from ftjax.step import Objective
from ftjax.weights import Array

PyTree = Any
KINDS = ("pair", "answer", "text")  # of rows, and leaves of a batch
WHOLE = "prompt+chosen"


def orpo(model: Decoder, config: Any) -> Objective:
    """NLL per token, and -beta log s(log odds ratio) per pair.

    Args:
      model: of the policy; there is no reference.
      config: `loss` of `configs/orpo.py`: beta, nll_scope ('prompt+chosen', as TRL and
        the authors have it, or 'chosen'), answer_weight and text_weight (of the tokens
        of such rows; those of pairs count 1), chunk.
    """

    def loss(policy: PyTree, frozen: PyTree, batch: PyTree, key: Any = None) -> Sums:
        del frozen
        weights_BT = nll_weights(batch, config)
        hidden, head = hidden_and_head(model, policy, batch, key)
        looked = jnp.maximum(batch["weights"], weights_BT)
        tokens = token_logps(hidden, head, batch["targets"], looked, config.chunk)
        answer_BT = batch["weights"]
        sums = rows.pair_sums(tokens.logp_BT * answer_BT, batch)
        sides = zip(sums, rows.pair_sums(answer_BT, batch), strict=True)
        chosen, rejected = (per_token(*side) for side in sides)
        each = odds_ratio(chosen, rejected, beta=config.beta) * batch["pair"]
        terms = {
            "nll": -jnp.sum(tokens.logp_BT * weights_BT),
            "odds_ratio": jnp.sum(each),
        }
        means = rows.means(metrics(chosen, rejected, beta=config.beta), batch["pair"])
        means |= rows.side_metrics(tokens, batch)
        means |= nll_by_kind(tokens.logp_BT, weights_BT, batch)
        return Sums(terms, means, {})

    over = {
        "nll": lambda batch: nll_weights(batch, config),
        "odds_ratio": lambda batch: batch["pair"],
    }
    counts = {f"tokens/{kind}": partial(kind_weights, config, kind) for kind in KINDS}
    return Objective(loss, over, counts)


def nll_weights(batch: PyTree, config: Any) -> Array:
    """The weight of each token in the likelihood: float32 [..., T]."""
    group, member = rows.member_of(batch)
    kind = {name: rows.of_group(batch[name], group) for name in KINDS}
    there, answer = batch["segments"] > 0, batch["weights"]
    own = there.astype(jnp.float32) if config.nll_scope == WHOLE else answer
    chosen = jnp.where(member == 0, own, 0)
    single = config.answer_weight * kind["answer"] + config.text_weight * kind["text"]
    return jnp.where(there, chosen * kind["pair"] + answer * single, 0)


def kind_weights(config: Any, kind: str, batch: PyTree) -> Array:
    """The weight in the likelihood of the tokens of one kind of rows: [..., T]."""
    group, _ = rows.member_of(batch)
    return nll_weights(batch, config) * rows.of_group(batch[kind], group)


def nll_by_kind(logp_BT: Array, weights_BT: Array, batch: PyTree) -> dict[str, Term]:
    """The likelihood of each kind of rows, apart."""
    group, _ = rows.member_of(batch)
    found = {}
    for name in KINDS:
        own = weights_BT * rows.of_group(batch[name], group)
        found[f"nll/{name}"] = Term(-jnp.sum(logp_BT * own), jnp.sum(own))
    return found
