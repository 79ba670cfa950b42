"""Odds ratio preference optimization (Hong et al., arXiv 2403.07691).

    loss = NLL(y_w) - beta log s(log odds(y_w) - log odds(y_l)),  odds(y) = P / (1 - P)

log P(y) is the mean log-probability of the completion's tokens; there is no reference.
This file has the second term. The first is `causal_lm`'s: over prompt and completion in
TRL 1.16 and the authors' code (whose beta is called lambda), over the completion alone
in others.
"""

import math

import jax
import jax.numpy as jnp

from ftjax.losses.pairs import Scalar, logp_metrics, reward_metrics
from ftjax.weights import Array

# log of the largest float32 below 1; no gradient flows from above it.
SUREST = -(2.0**-24)


def odds_ratio(chosen: Array, rejected: Array, *, beta: Scalar) -> Array:
    """-beta log s(log odds ratio), per pair, of mean log-probabilities per token."""
    return -beta * jax.nn.log_sigmoid(log_odds_ratio(chosen, rejected))


def log_odds_ratio(chosen: Array, rejected: Array) -> Array:
    """log odds(chosen) - log odds(rejected)."""
    return _log_odds(chosen) - _log_odds(rejected)


def metrics(chosen: Array, rejected: Array, *, beta: Scalar) -> dict[str, Array]:
    """Per pair, under TRL's names; rewards are beta log P, `logps/*` means per token.

    `log_odds_chosen` is the log odds ratio and `log_odds_ratio` its log-sigmoid: the
    names are TRL's.
    """
    odds = jax.lax.stop_gradient(log_odds_ratio(chosen, rejected))
    return {
        **reward_metrics(beta * chosen, beta * rejected),
        **logp_metrics(chosen, rejected),
        "log_odds_chosen": odds,
        "log_odds_ratio": jax.nn.log_sigmoid(odds),
    }


def _log_odds(logp: Array) -> Array:
    logp = jnp.minimum(logp, SUREST)
    return logp - log1mexp(logp)


def log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0, by whichever of two forms does not cancel."""
    near = x > -math.log(2)
    small = jnp.log(-jnp.expm1(jnp.where(near, x, -1)))
    large = jnp.log1p(-jnp.exp(jnp.where(near, -1, x)))
    return jnp.where(near, small, large)
