"""Causal language modelling: SFT and general fine-tuning differ in the weights alone.

    loss = sum_t w_t * -log p(y_t | y_<t) / sum_t w_t

the sums taken over the whole optimizer step (all rows, micro-batches, devices). The
definition is that of transformers' `ForCausalLMLoss` with `num_items_in_batch`, counted
on the shifted labels.
"""

from collections.abc import Mapping

import jax.numpy as jnp

from ftjax.losses.logprobs import chunked_nll
from ftjax.losses.sums import Sums, Term
from ftjax.weights import Array


def causal_lm(
    hidden_BTD: Array, head_DV: Array, batch: Mapping[str, Array], chunk: int
) -> Sums:
    """The loss of a batch with `targets` int32 and `weights` float32, both [B, T]."""
    weights = batch["weights"]
    nll = chunked_nll(hidden_BTD, head_DV, batch["targets"], weights, chunk)
    accuracy = Term(nll.correct, jnp.sum(weights))
    return Sums({"nll": nll.sum}, {"token_accuracy": accuracy}, {})
