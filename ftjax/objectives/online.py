"""What the objectives share that learn from sampled answers.

The rows of a batch come from `rl.rollouts`, one answer each. Beside the usual leaves
they bring, [rows, T]: `advantage`, and where they differ from what the policy says now,
`old_logp`; `ref_logp` where a reference counts. What is only to be told comes per row,
under names that begin with `metric/`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ftjax.losses.policy import clip_metrics, k3
from ftjax.losses.sums import Term
from ftjax.losses.token_logps import TokenLogps, token_logps
from ftjax.models.decoder import Decoder, hidden_and_head
from ftjax.objectives import rows
from ftjax.weights import Array

PyTree = Any
METRIC = "metric/"
LENGTH = "completions/mean_length"


def read(
    model: Decoder, variables: PyTree, batch: PyTree, loss: Any, key: Any = None
) -> tuple[Array, TokenLogps]:
    """(hidden states, log-probabilities at the temperature of sampling) of the rows.

    Args:
      loss: `config.loss`: chunk, temperature.
    """
    hidden, head = hidden_and_head(model, variables, batch, key)
    looked = batch["targets"], batch["weights"], loss.chunk
    return hidden, token_logps(hidden, head, *looked, temperature=loss.temperature)


def old_and_reference(logp_BT: Array, batch: PyTree) -> tuple[Array, Array]:
    """log p under the policy that sampled, and under the reference.

    In the first update after a rollout the policy is the one that sampled.
    """
    old = batch.get("old_logp", jax.lax.stop_gradient(logp_BT))
    return old, batch.get("ref_logp", old)


def token_metrics(
    tokens: TokenLogps, batch: PyTree, *, low: float, high: float
) -> dict[str, Term]:
    """Means over trained tokens: entropy, clip_ratio/*, and kl where it is known."""
    weights_BT = batch["weights"]
    logp = jax.lax.stop_gradient(tokens.logp_BT)
    old, reference = old_and_reference(logp, batch)
    values = clip_metrics(logp, old, batch["advantage"], low=low, high=high)
    values["entropy"] = tokens.entropy_BT
    if "ref_logp" in batch:
        values["kl"] = k3(logp, reference)
    return rows.means(values, weights_BT)


def row_metrics(batch: PyTree) -> tuple[dict[str, Term], dict[str, Array]]:
    """Means and extremes of what the rows say of themselves; NaN says nothing."""
    means = {}
    for name, x in batch.items():
        if name.startswith(METRIC):
            known = ~jnp.isnan(x)
            weight = jnp.sum(known.astype(jnp.float32))
            means[name[len(METRIC) :]] = Term(jnp.sum(jnp.where(known, x, 0)), weight)
    length = batch[METRIC + LENGTH]
    most = {
        "completions/max_length": jnp.max(length),
        "-completions/min_length": jnp.max(-length),
    }
    return means, most
