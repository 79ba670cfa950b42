"""SFT and general fine-tuning: the rows' weights tell them apart."""

from typing import Any

import jax
import jax.numpy as jnp

from ftjax.errors import UserError
from ftjax.losses.causal_lm import OTHER, causal_lm, dynamic_lm
from ftjax.losses.neftune import noise
from ftjax.losses.sums import Sums, Term
from ftjax.models.decoder import Decoder, hidden_and_head
from ftjax.step import Objective
from ftjax.weights import Array

PyTree = Any
TYPES = ("nll", "dft")


def causal(
    model: Decoder,
    chunk: int,
    *,
    kind: str = "nll",
    label_smoothing: float = 0.0,
    neftune_alpha: float = 0.0,
) -> Objective:
    """-log p of every trained token, per trained token; see `losses.causal_lm`.

    Evaluation (without a key) is of -log p, whatever is trained on: so it is the same
    number for every kind of loss, and noise is for training alone.

    Args:
      model: of the policy.
      chunk: positions per row that the head handles at a time.
      kind: 'nll', or 'dft': dynamic fine-tuning.
      label_smoothing: of 'nll'.
      neftune_alpha: of the noise on the embeddings; 0: none.

    Raises:
      UserError: there is no such loss, or 'dft' with smoothed labels.
    """
    check(kind, label_smoothing)

    def loss(policy: PyTree, frozen: PyTree, batch: PyTree, key: Any = None) -> Sums:
        del frozen
        if key is None:
            found = causal_lm(*hidden_and_head(model, policy, batch), batch, chunk)
            return found if plain else _renamed(found, batch["weights"])
        added = None
        if neftune_alpha:
            own = jax.random.fold_in(key, 1)
            added = noise(own, batch["segments"], model.spec.d_model, neftune_alpha)
        both = hidden_and_head(model, policy, batch, key, added)
        if kind == "dft":
            return dynamic_lm(*both, batch, chunk)
        return causal_lm(*both, batch, chunk, label_smoothing=label_smoothing)

    plain = kind == "nll" and not label_smoothing
    term = "nll" if plain else OTHER
    return Objective(loss, over={term: lambda batch: batch["weights"]})


def _renamed(found: Sums, weights: Array) -> Sums:
    """-log p under the name of the term that is trained, and as a metric."""
    nll = found.terms["nll"]
    means = found.means | {"nll": Term(nll, jnp.sum(weights))}
    return Sums({OTHER: nll}, means, found.most)


def check(kind: str, label_smoothing: float) -> None:
    """What `causal` may be asked for; see there."""
    if kind not in TYPES:
        raise UserError(
            "there is no such loss of tokens",
            where="config.loss.type",
            expected=", ".join(TYPES),
            got=kind,
        )
    if kind == "dft" and label_smoothing:
        raise UserError(
            "dft weighs each token by its probability and knows no smoothed labels",
            where="config.loss.type, config.loss.label_smoothing",
            expected="type=nll, or label_smoothing=0",
            got=f"type=dft, label_smoothing={label_smoothing}",
        )
