"""Direct preference optimization (Rafailov et al., arXiv 2305.18290).

    loss = -log s(beta D),  D = log p(y_w) / p_ref(y_w) - log p(y_l) / p_ref(y_l)

s the logistic function, sums over the tokens of the completions. `LOSSES` names this
loss and its relatives as TRL 1.16 does, each called with all pairs of a batch and
giving one value per pair.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.losses import dpo_variants as variants
from ftjax.losses.f_divergence import SCORES
from ftjax.losses.pairs import Pairs, Scalar, logp_metrics, reward_metrics
from ftjax.weights import Array

ROUNDING = 2.0**-20  # of log-probabilities summed in float32


class Options(NamedTuple):
    """What a loss of `LOSSES` reads of the config; numbers may be traced."""

    beta: Scalar = 0.1
    label_smoothing: Scalar = 0.0  # eps of sigmoid, robust, exo_pair, aot*
    divergence: str = "reverse_kl"  # a name of `f_divergence.SCORES`
    alpha: Scalar = 0.5  # of alpha_divergence
    tau: Scalar = 0.05  # of discopop


def sigmoid(delta: Array, *, beta: Scalar, label_smoothing: Scalar = 0.0) -> Array:
    """-(1 - eps) log s(b D) - eps log s(-b D); DPO where eps is 0.

    eps is that of conservative DPO (Mitchell, 2023: labels are flipped with probability
    eps), as in the DPO authors' code and in TRL before 0.29. Later TRL ignores it here.
    """
    u, eps = beta * delta, label_smoothing
    return -(1 - eps) * jax.nn.log_sigmoid(u) - eps * jax.nn.log_sigmoid(-u)


def metrics(pairs: Pairs, *, beta: Scalar) -> dict[str, Array]:
    """Per pair, under TRL's names: rewards beta log p / p_ref, whatever the loss."""
    rewards = (beta * pairs.chosen_ratio, beta * pairs.rejected_ratio)
    # Policy and reference are two passes, which XLA may round differently even where
    # the weights are the same: so small a difference is a tie.
    sizes = sum(jnp.abs(x) for x in pairs[:4])
    noise = ROUNDING * beta * sizes
    return reward_metrics(*rewards, noise) | logp_metrics(pairs.chosen, pairs.rejected)


def length_desensitized(position: Array, shared: Array, alpha: Scalar) -> Array:
    """Weights of tokens by which LD-DPO (arXiv 2409.06411) sums log-probabilities.

    1 up to the length of the pair's shorter completion, `alpha` beyond it; DPO where
    alpha is 1. The loss `sft` and all lengths keep the plain weights.

    Args:
      position: the token's place in its completion, from 1; 0 elsewhere.
      shared: the length of the pair's shorter completion; the same shape.
      alpha: in [0, 1].
    """
    beyond = jnp.where(position > shared, alpha, 1.0)
    return jnp.where(position > 0, beyond, 0.0).astype(jnp.float32)


def _scores(pairs: Pairs, o: Options) -> tuple[Array, Array]:
    score = SCORES[o.divergence]
    return score(pairs.chosen_ratio, o.alpha), score(pairs.rejected_ratio, o.alpha)


def _delta(pairs: Pairs, o: Options) -> Array:
    chosen, rejected = _scores(pairs, o)
    return chosen - rejected


def _ratios(pairs: Pairs) -> tuple[Array, Array]:
    return pairs.chosen_ratio, pairs.rejected_ratio


def _lengths(pairs: Pairs) -> tuple[Array, Array]:
    return pairs.n_chosen, pairs.n_rejected


def _smoothing(o: Options) -> dict[str, Scalar]:
    return {"beta": o.beta, "label_smoothing": o.label_smoothing}


def _aot(real: Array, policy: Array, reference: Array, o: Options) -> Array:
    eps = o.label_smoothing
    return variants.aot(policy, reference, real, beta=o.beta, label_smoothing=eps)


Loss = Callable[[Pairs, Options], Array]

# Losses of the difference of two scores, which may come from any divergence.
OF_SCORES: dict[str, Loss] = {
    "sigmoid": lambda p, o: sigmoid(_delta(p, o), **_smoothing(o)),
    "hinge": lambda p, o: variants.hinge(_delta(p, o), beta=o.beta),
    "ipo": lambda p, o: variants.ipo(*_scores(p, o), *_lengths(p), beta=o.beta),
    "ipo_sum": lambda p, o: variants.ipo_sum(_delta(p, o), beta=o.beta),
    "exo_pair": lambda p, o: variants.exo_pair(_delta(p, o), **_smoothing(o)),
    "robust": lambda p, o: variants.robust(_delta(p, o), **_smoothing(o)),
    "discopop": lambda p, o: variants.discopop(_delta(p, o), beta=o.beta, tau=o.tau),
    "sigmoid_norm": lambda p, o: variants.sigmoid_norm(
        *_scores(p, o), *_lengths(p), beta=o.beta
    ),
    "sft": lambda p, o: variants.sft(p.chosen, p.n_chosen, p.real),
}

# Losses of the log-ratios themselves: the divergence must be `reverse_kl`.
OF_RATIOS: dict[str, Loss] = {
    "nca_pair": lambda p, o: variants.nca_pair(*_ratios(p), beta=o.beta),
    "bco_pair": lambda p, o: variants.bco_pair(*_ratios(p), beta=o.beta),
    "sppo_hard": lambda p, o: variants.sppo_hard(*_ratios(p), beta=o.beta),
    "aot": lambda p, o: _aot(
        p.real, p.chosen - p.rejected, p.ref_chosen - p.ref_rejected, o
    ),
    "aot_unpaired": lambda p, o: _aot(p.real, *_ratios(p), o),
    "apo_zero": lambda p, o: variants.apo_zero(*_ratios(p), beta=o.beta),
    "apo_down": lambda p, o: variants.apo_down(*_ratios(p), beta=o.beta),
}

LOSSES = OF_SCORES | OF_RATIOS
# They look at all pairs at once, so they mean something else on a part of a batch.
WHOLE_BATCH = frozenset({"aot", "aot_unpaired", "sft"})
