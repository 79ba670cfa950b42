"""The losses that TRL's DPO trainer offers beside DPO's own: one function each.

c and r are log p / p_ref of the chosen and the rejected completion, sums over tokens; D
is c - r, or the difference of their scores under another divergence; b is beta, eps
`label_smoothing`, s the logistic function. Formulas as in TRL 1.16
(`DPOTrainer._compute_loss`), computed from logarithms in float32: they and their
gradients stay finite for any |D| that a model can produce.
"""

import jax
import jax.numpy as jnp

from ftjax.losses.pairs import Scalar, per_token
from ftjax.weights import Array

log_sigmoid = jax.nn.log_sigmoid


def hinge(delta: Array, *, beta: Scalar) -> Array:
    """max(0, 1 - b D): SLiC (arXiv 2305.10425) with a reference, as in 2309.06657."""
    return jax.nn.relu(1 - beta * delta)


def ipo(
    chosen: Array,
    rejected: Array,
    n_chosen: Array,
    n_rejected: Array,
    *,
    beta: Scalar,
) -> Array:
    """(c / n_c - r / n_r - 1 / (2 b))^2: IPO (arXiv 2310.12036), per token as in TRL.

    The paper's formula and the DPO authors' code have the sums: see `ipo_sum`.
    """
    delta = per_token(chosen, n_chosen) - per_token(rejected, n_rejected)
    return ipo_sum(delta, beta=beta)


def ipo_sum(delta: Array, *, beta: Scalar) -> Array:
    """(D - 1 / (2 b))^2: IPO (arXiv 2310.12036, eq. 17) with sums over tokens."""
    return jnp.square(delta - 1 / (2 * beta))


def exo_pair(delta: Array, *, beta: Scalar, label_smoothing: Scalar) -> Array:
    """s(bD) [log s(bD) - log(1 - eps)] + s(-bD) [log s(-bD) - log eps].

    EXO for a pair (arXiv 2402.00856, eq. 16): the reverse KL between the policy's
    preference and (1 - eps, eps). eps must be above 0; the paper has 1e-3.
    """
    u, eps = beta * delta, jnp.asarray(label_smoothing, delta.dtype)
    ahead = jax.nn.sigmoid(u) * (log_sigmoid(u) - jnp.log1p(-eps))
    behind = jax.nn.sigmoid(-u) * (log_sigmoid(-u) - jnp.log(eps))
    return ahead + behind


def nca_pair(chosen: Array, rejected: Array, *, beta: Scalar) -> Array:
    """-log s(bc) - (log s(-bc) + log s(-br)) / 2: NCA of a pair (arXiv 2402.05369)."""
    up = log_sigmoid(beta * chosen)
    down = log_sigmoid(-beta * chosen) + log_sigmoid(-beta * rejected)
    return -up - down / 2


def robust(delta: Array, *, beta: Scalar, label_smoothing: Scalar) -> Array:
    """[-(1 - eps) log s(bD) + eps log s(-bD)] / (1 - 2 eps).

    Robust DPO (arXiv 2403.00409): unbiased where labels are flipped with probability
    eps, in [0, 1/2). It is negative where D is large.
    """
    u, eps = beta * delta, label_smoothing
    kept, flipped = (1 - eps) * log_sigmoid(u), eps * log_sigmoid(-u)
    return (flipped - kept) / (1 - 2 * eps)


def bco_pair(chosen: Array, rejected: Array, *, beta: Scalar) -> Array:
    """-log s(bc) - log s(-br): BCO (arXiv 2404.04656), no running reward shift."""
    return -log_sigmoid(beta * chosen) - log_sigmoid(-beta * rejected)


def sppo_hard(chosen: Array, rejected: Array, *, beta: Scalar) -> Array:
    """(c - 1/(2b))^2 + (r + 1/(2b))^2: SPPO (arXiv 2405.00675), the winner sure."""
    half = 0.5 / beta
    return jnp.square(chosen - half) + jnp.square(rejected + half)


def aot(
    policy: Array,
    reference: Array,
    real: Array,
    *,
    beta: Scalar,
    label_smoothing: Scalar,
) -> Array:
    """-(1 - eps) log s(b d) - eps log s(-b d), d between equal ranks in the batch.

    AOT (arXiv 2406.05882): `policy` and `reference` are each sorted and then compared.
    For pairs they are log p(chosen) - log p(rejected) under the two models; unpaired,
    they are c and r. The batch is the whole array: it may not be split. A pair's loss
    is that of its own rank in `policy`.

    Args:
      policy: any shape.
      reference: the same shape.
      real: bool, the same shape: which slots hold a pair; the others give log 2.
    """
    p, q, mask = policy.ravel(), reference.ravel(), real.ravel()
    rank = jnp.argsort(_ascending(p, mask))
    matched = jnp.where(mask, q, 0)[_ascending(q, mask)][rank]
    u = beta * jnp.where(mask, p - matched, 0).reshape(policy.shape)
    eps = label_smoothing
    return -(1 - eps) * log_sigmoid(u) - eps * log_sigmoid(-u)


def _ascending(x: Array, mask: Array) -> Array:
    """The order of the masked elements; the others come last."""
    return jnp.argsort(jnp.where(mask, jax.lax.stop_gradient(x), jnp.inf))


def apo_zero(chosen: Array, rejected: Array, *, beta: Scalar) -> Array:
    """1 - s(bc) + s(br): APO-zero (arXiv 2408.06266, eq. 7); one up, one down."""
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down(chosen: Array, rejected: Array, *, beta: Scalar) -> Array:
    """s(bc) + 1 - s(bD): APO-down (arXiv 2408.06266, eq. 8); both down, apart."""
    delta = chosen - rejected
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * delta)


def discopop(delta: Array, *, beta: Scalar, tau: Scalar) -> Array:
    """(1 - g) (-log s(u)) + g exp(-u), u = b D, g = s(u / tau).

    DiscoPOP (arXiv 2406.08414, eq. 5; tau 0.05). The second product is one exponential
    of a sum: its factors overflow and vanish at once. It is bounded for tau <= 1.
    """
    u = beta * delta
    logistic = -jax.nn.sigmoid(-u / tau) * log_sigmoid(u)
    return logistic + jnp.exp(log_sigmoid(u / tau) - u)


def sft(chosen: Array, n_chosen: Array, real: Array) -> Array:
    """-log p(chosen), so scaled that its mean over pairs is the mean over tokens.

    `chosen` is the policy's log-probability. The factor (pairs / tokens) is that of the
    whole array. The RPO loss (arXiv 2404.19733) is `sigmoid` and a part of this.
    """
    pairs = jnp.sum(real.astype(chosen.dtype))
    return -chosen * (pairs / jnp.maximum(jnp.sum(n_chosen), 1))


def sigmoid_norm(
    chosen: Array,
    rejected: Array,
    n_chosen: Array,
    n_rejected: Array,
    *,
    beta: Scalar,
) -> Array:
    """-log s(b (c / n_c - r / n_r)): DPO per token (Tülu 3, arXiv 2411.15124)."""
    delta = per_token(chosen, n_chosen) - per_token(rejected, n_rejected)
    return -log_sigmoid(beta * delta)
