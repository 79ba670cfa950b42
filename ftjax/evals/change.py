"""How far a model's answers move when its weights do: two sets of weights, one text."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ftjax.models.decoder import Decoder
from ftjax.sharding import put_batch

PyTree = Any


def change(
    model: Decoder,
    before: PyTree,
    after: PyTree,
    batches: Iterable[dict[str, np.ndarray]],
    sharding: NamedSharding,
) -> dict[str, float]:
    """Compares the predictions at every position that has a target.

    Args:
      model: of both.
      before: its variables.
      after: the same with other weights, perhaps quantized.
      batches: a few rows each: logits [rows, T, V] are made, of both.
      sharding: of a batch.

    Returns:
      `loss_before` and `loss_after`, nats per token; `kl`, the mean of
      KL(before || after); `logits_max` and `logits_mean`, of |difference|; `agree`, the
      share of positions with the same likeliest token; `tokens`.
    """
    sums = jax.jit(lambda a, b, batch: _sums(model, a, b, batch))
    rows = []
    largest = 0.0
    for batch in batches:
        found = sums(before, after, put_batch(batch, sharding))
        rows.append([float(x) for x in found[:-1]])
        largest = max(largest, float(found[-1]))
    tokens, old, new, kl, apart, agree = np.sum(rows, axis=0).tolist()
    count = tokens or math.nan
    return {
        "loss_before": old / count,
        "loss_after": new / count,
        "kl": kl / count,
        "logits_mean": apart / count,
        "logits_max": largest,
        "agree": agree / count,
        "tokens": int(tokens),
    }


def _sums(model: Decoder, before: PyTree, after: PyTree, batch: PyTree) -> Any:
    inputs = (batch["tokens"], batch["positions"], batch["segments"])
    a_BTV, b_BTV = (
        model.apply(v, *inputs, method="logits").astype(jnp.float32)
        for v in (before, after)
    )
    p_BTV, q_BTV = jax.nn.log_softmax(a_BTV), jax.nn.log_softmax(b_BTV)
    weights_BT, targets_BT1 = batch["weights"], batch["targets"][..., None]

    def total(x_BT: jax.Array) -> jax.Array:
        return jnp.sum(weights_BT * x_BT)

    def loss(logp_BTV: jax.Array) -> jax.Array:
        return -total(jnp.take_along_axis(logp_BTV, targets_BT1, axis=-1)[..., 0])

    apart_BTV = jnp.abs(a_BTV - b_BTV)
    same_BT = jnp.argmax(a_BTV, -1) == jnp.argmax(b_BTV, -1)
    return (
        jnp.sum(weights_BT),
        loss(p_BTV),
        loss(q_BTV),
        total(jnp.sum(jnp.exp(p_BTV) * (p_BTV - q_BTV), axis=-1)),
        total(jnp.mean(apart_BTV, axis=-1)),
        total(same_BT.astype(jnp.float32)),
        jnp.max(jnp.where((weights_BT > 0)[..., None], apart_BTV, 0)),
    )
