"""Contrastive preference optimization (Xu et al., arXiv 2401.08417).

    loss = -log s(beta (log p(y_w) - log p(y_l))) + alpha NLL(y_w)

DPO whose reference is uniform. This file has the first term and what TRL 1.16 offers in
its place; the second, over completion tokens and with a weight of 1 in TRL, is
`causal_lm`'s. `kto_pair` has left TRL.
"""

from collections.abc import Callable
from typing import NamedTuple

from ftjax.losses import dpo, dpo_variants, simpo
from ftjax.losses.f_divergence import alpha_divergence
from ftjax.losses.pairs import (
    Pairs,
    Scalar,
    logp_metrics,
    per_token,
    reward_metrics,
)
from ftjax.weights import Array


class Options(NamedTuple):
    """What a loss of `LOSSES` reads of the config; numbers may be traced."""

    beta: Scalar = 0.1
    label_smoothing: Scalar = 0.0  # eps of sigmoid and simpo
    gamma: Scalar = 0.5  # of simpo
    alpha: Scalar = 0.0  # of `alpha_reward`; 0 is the log-probability itself


def alpha_reward(logp: Array, alpha: Scalar) -> Array:
    """(1 - p^-alpha) / alpha, log p at 0: the reward of AlphaPO (arXiv 2501.03884).

    With `simpo` it is the paper's loss, and TRL's `alphapo`; there is no NLL then.
    """
    return alpha_divergence(logp, 1.0 - alpha)


def _sums(p: Pairs, o: Options) -> tuple[Array, Array]:
    return alpha_reward(p.chosen, o.alpha), alpha_reward(p.rejected, o.alpha)


def _means(p: Pairs, o: Options) -> tuple[Array, Array]:
    chosen = per_token(p.chosen, p.n_chosen)
    rejected = per_token(p.rejected, p.n_rejected)
    return alpha_reward(chosen, o.alpha), alpha_reward(rejected, o.alpha)


def sigmoid(p: Pairs, o: Options) -> Array:
    """-(1 - eps) log s(b D) - eps log s(-b D), D of sums: CPO."""
    chosen, rejected = _sums(p, o)
    eps = o.label_smoothing
    return dpo.sigmoid(chosen - rejected, beta=o.beta, label_smoothing=eps)


def hinge(p: Pairs, o: Options) -> Array:
    """max(0, 1 - b D), D of sums: SLiC (arXiv 2305.10425)."""
    chosen, rejected = _sums(p, o)
    return dpo_variants.hinge(chosen - rejected, beta=o.beta)


def ipo(p: Pairs, o: Options) -> Array:
    """(D - 1 / (2 b))^2, D of means per token: IPO (arXiv 2310.12036) as in TRL."""
    chosen, rejected = _means(p, o)
    return dpo_variants.ipo_sum(chosen - rejected, beta=o.beta)


def _simpo(p: Pairs, o: Options) -> Array:
    eps = o.label_smoothing
    return simpo.simpo(*_means(p, o), beta=o.beta, gamma=o.gamma, label_smoothing=eps)


# The pairs' fields of the reference are not read.
LOSSES: dict[str, Callable[[Pairs, Options], Array]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "simpo": _simpo,
}
PER_TOKEN = frozenset({"ipo", "simpo"})


def metrics(pairs: Pairs, o: Options, name: str) -> dict[str, Array]:
    """Per pair, under TRL's names: rewards are beta times what the loss `name` reads.

    `logps/*` are sums, or means per token in the losses of `PER_TOKEN`.
    """
    read = _means if name in PER_TOKEN else _sums
    chosen, rejected = read(pairs, o)
    logps = read(pairs, o._replace(alpha=0.0))
    return reward_metrics(o.beta * chosen, o.beta * rejected) | logp_metrics(*logps)
