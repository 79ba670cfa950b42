"""Causal language modelling: SFT and general fine-tuning differ in the weights alone.

    loss = sum_t w_t * -log p(y_t | y_<t) / sum_t w_t

the sums taken over the whole optimizer step (all rows, micro-batches, devices). The
definition is that of transformers' `ForCausalLMLoss` with `num_items_in_batch`, counted
on the shifted labels. Label smoothing and DFT put another function of the token in the
place of -log p; `nll` then says what that is.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax.lax import stop_gradient

from ftjax.losses.logprobs import chunked_nll
from ftjax.losses.sums import Sums, Term
from ftjax.losses.token_logps import token_logps
from ftjax.losses.token_losses import dft
from ftjax.weights import Array

OTHER = "token_loss"  # the term of a loss that is not -log p


def causal_lm(
    hidden_BTD: Array,
    head_DV: Array,
    batch: Mapping[str, Array],
    chunk: int,
    *,
    label_smoothing: float = 0.0,
) -> Sums:
    """The loss of a batch with `targets` int32 and `weights` float32, both [B, T].

    The term is `nll`, or `token_loss` where it is smoothed.
    """
    weights = batch["weights"]
    nll = chunked_nll(
        hidden_BTD,
        head_DV,
        batch["targets"],
        weights,
        chunk,
        label_smoothing=label_smoothing,
    )
    total = jnp.sum(weights)
    means = {"token_accuracy": Term(nll.correct, total)}
    if not label_smoothing:
        return Sums({"nll": nll.sum}, means, {})
    means["nll"] = Term(-jnp.sum(weights * nll.logp_BT), total)
    return Sums({OTHER: nll.sum}, means, {})


def dynamic_lm(
    hidden_BTD: Array, head_DV: Array, batch: Mapping[str, Array], chunk: int
) -> Sums:
    """Dynamic fine-tuning, as `token_losses.dft`: the term `token_loss`."""
    weights = batch["weights"]
    found = token_logps(hidden_BTD, head_DV, batch["targets"], weights, chunk)
    total = jnp.sum(weights)
    means = {
        "token_accuracy": Term(jnp.sum(weights * found.correct_BT), total),
        "nll": Term(-jnp.sum(weights * stop_gradient(found.logp_BT)), total),
    }
    return Sums({OTHER: jnp.sum(weights * dft(found.logp_BT))}, means, {})
