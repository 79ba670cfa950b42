"""The loss over a whole data set: exact sums, divided once."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from ftjax.losses.causal_lm import Sums, causal_lm
from ftjax.models.decoder import Decoder, hidden_and_head
from ftjax.sharding import put_batch

PyTree = Any
SumBatch = Callable[[PyTree, PyTree], Sums]


def make_sum_batch(model: Decoder, chunk: int) -> SumBatch:
    """The jitted sums of one batch, `f(variables, batch)`."""

    def sums(variables: PyTree, batch: PyTree) -> Sums:
        return causal_lm(*hidden_and_head(model, variables, batch), batch, chunk)

    return jax.jit(sums)


def evaluate(
    sum_batch: SumBatch,
    variables: PyTree,
    batches: Iterable[dict[str, np.ndarray]],
    sharding: NamedSharding,
) -> dict[str, float]:
    """Loss per trained token, perplexity, token accuracy and tokens, over all batches.

    Sums within a batch are float32, over batches float64. A batch is sent while the
    one before it is computed.
    """
    waiting = [sum_batch(variables, put_batch(b, sharding)) for b in batches]
    total = np.sum([[float(x) for x in sums] for sums in waiting], axis=0)
    loss, weight, correct = total.tolist()
    mean = loss / weight if weight else math.nan
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "token_accuracy": correct / weight if weight else math.nan,
        "tokens": int(weight),
    }
