"""An objective over a whole data set: exact sums, divided once."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ftjax.losses.sums import Sums, extremes
from ftjax.sharding import put_batch
from ftjax.step import Objective, Totals

PyTree = Any
SumBatch = Callable[[PyTree, PyTree, PyTree], tuple[Sums, Totals, dict[str, jax.Array]]]


def make_sum_batch(objective: Objective) -> SumBatch:
    """Jitted `f(policy, frozen, batch)`: sums, what divides them, what is counted."""

    def sums(policy: PyTree, frozen: PyTree, batch: PyTree) -> Any:
        found = objective.loss(policy, frozen, batch, None)
        counts = {"tokens": jnp.sum(batch["weights"]), **objective.counted(batch)}
        return found, objective.totals(batch), counts

    return jax.jit(sums)


def evaluate(
    sum_batch: SumBatch,
    policy: PyTree,
    frozen: PyTree,
    batches: Iterable[dict[str, np.ndarray]],
    sharding: NamedSharding,
) -> dict[str, float]:
    """The loss, its terms where there are several, the metrics, and trained `tokens`.

    Sums within a batch are float32, over batches float64. A batch is sent while the
    one before it is computed. The mean negative log-likelihood of tokens comes with
    its `perplexity`.
    """
    waiting = [sum_batch(policy, frozen, put_batch(b, sharding)) for b in batches]
    rows = [jax.tree.map(float, row) for row in waiting]
    terms = {
        name: _ratio((sums.terms[name], totals[name]) for sums, totals, _ in rows)
        for name in rows[0][1]
    }
    present = [value for value in terms.values() if not math.isnan(value)]
    found = {"loss": math.fsum(present) if present else math.nan}
    found |= terms if len(terms) > 1 else {}
    if "nll" in terms:
        found["perplexity"] = math.exp(min(terms["nll"], 700.0))
    first = rows[0][0]
    means = {k: _ratio(sums.means[k] for sums, _, _ in rows) for k in first.means}
    found |= {k: x for k, x in means.items() if not math.isnan(x)}
    most = {k: max(sums.most[k] for sums, _, _ in rows) for k in first.most}
    found |= extremes(most)
    counts = {k: math.fsum(counts[k] for _, _, counts in rows) for k in rows[0][2]}
    return {**found, **counts, "tokens": int(counts["tokens"])}


def _ratio(parts: Iterable[tuple[float, float]]) -> float:
    """The sum of the sums over the sum of the weights; NaN where there is none."""
    sums, weights = zip(*parts, strict=True)
    weight = math.fsum(weights)
    return math.fsum(sums) / weight if weight else math.nan
