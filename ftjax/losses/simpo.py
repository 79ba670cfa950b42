"""Simple preference optimization (Meng et al., arXiv 2405.14734).

    loss = -log s(beta (log p(y_w) / |y_w| - log p(y_l) / |y_l|) - gamma)

There is no reference; log-probabilities are means over tokens. gamma is the paper's,
as in TRL; the authors' code has the ratio gamma / beta in its config.
"""

from ftjax.losses import dpo
from ftjax.losses.pairs import Scalar
from ftjax.weights import Array


def simpo(
    chosen: Array,
    rejected: Array,
    *,
    beta: Scalar,
    gamma: Scalar,
    label_smoothing: Scalar = 0.0,
) -> Array:
    """The loss of each pair, of mean log-probabilities per token.

    eps `label_smoothing` is that of TRL: -(1 - eps) log s(u) - eps log s(-u).
    """
    delta = chosen - rejected - gamma / beta
    return dpo.sigmoid(delta, beta=beta, label_smoothing=label_smoothing)
