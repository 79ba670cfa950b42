"""SFT and general fine-tuning: the rows' weights tell them apart."""

from typing import Any

from ftjax.losses.causal_lm import causal_lm
from ftjax.losses.sums import Sums
from ftjax.models.decoder import Decoder, hidden_and_head
from ftjax.step import Objective

PyTree = Any


def causal(model: Decoder, chunk: int) -> Objective:
    """-log p of every trained token, per trained token; see `losses.causal_lm`."""

    def loss(policy: PyTree, frozen: PyTree, batch: PyTree, key: Any = None) -> Sums:
        del frozen
        return causal_lm(*hidden_and_head(model, policy, batch, key), batch, chunk)

    return Objective(loss, over={"nll": lambda batch: batch["weights"]})
