"""An objective over a whole data set: exact sums, divided once."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
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
        return found, objective.totals(batch), objective.counted(batch)

    return jax.jit(sums)


def evaluate(
    sum_batch: SumBatch,
    policy: PyTree,
    frozen: PyTree,
    batches: Iterable[dict[str, np.ndarray]],
    sharding: NamedSharding,
    text_bytes: float | None = None,
) -> dict[str, float]:
    """The loss, its terms where there are several, the metrics, and trained `tokens`.

    Sums within a batch are float32, over batches float64. A batch is sent while the
    one before it is computed. The mean negative log-likelihood of tokens comes with
    its `perplexity`, exp(nll), and where `text_bytes` says how much text the trained
    tokens stand for, with `bits_per_byte` and `byte_perplexity`, its power of 2: those
    compare models with different tokenizers.
    """
    waiting = [sum_batch(policy, frozen, put_batch(b, sharding)) for b in batches]
    rows = [jax.tree.map(float, row) for row in waiting]
    terms = {
        name: _ratio((sums.terms[name], totals[name]) for sums, totals, _ in rows)
        for name in rows[0][1]
    }
    known = [name for name in terms if any(totals[name] for _, totals, _ in rows)]
    found = {"loss": math.fsum(terms[name] for name in known) if known else math.nan}
    first = rows[0][0]
    means = {k: _ratio(sums.means[k] for sums, _, _ in rows) for k in first.means}
    # A metric is of the data alone; a term of the same name may have a weight.
    all_of_it = terms | means
    if "nll" in all_of_it:
        parts = [
            s.means["nll"] if "nll" in means else (s.terms["nll"], n["nll"])
            for s, n, _ in rows
        ]
        found |= perplexities(parts, text_bytes)
    shown = all_of_it if len(terms) > 1 else means
    found |= {k: x for k, x in shown.items() if not math.isnan(x)}
    most = {k: max(sums.most[k] for sums, _, _ in rows) for k in first.most}
    found |= extremes(most)
    counts = {k: math.fsum(counts[k] for _, _, counts in rows) for k in rows[0][2]}
    trained = counts.pop("trained")
    return {**found, **counts, "tokens": int(trained)}


def perplexities(
    parts: list[tuple[float, float]], text_bytes: float | None
) -> dict[str, float]:
    """What -log p of tokens, in nats, is per token and per byte.

    Args:
      parts: sums over tokens, each with the sum of their weights.
      text_bytes: that the tokens stand for, by the same weights; None: not known.
    """
    nll = _ratio(parts)
    if math.isnan(nll):
        return {}
    found = {"perplexity": math.exp(min(nll, 700.0))}
    if text_bytes:
        bits = math.fsum(total for total, _ in parts) / text_bytes / math.log(2)
        found |= {"bits_per_byte": bits, "byte_perplexity": 2 ** min(bits, 1000.0)}
    return found


def _ratio(parts: Iterable[tuple[float, float]]) -> float:
    """The sum of the sums over the sum of the weights; NaN where there is none."""
    sums, weights = zip(*parts, strict=True)
    weight = math.fsum(weights)
    return math.fsum(sums) / weight if weight else math.nan
