"""Other losses of a token than -log p, of what `token_logps` gives; any shape."""

import jax
import jax.numpy as jnp

from ftjax.losses.pairs import Scalar
from ftjax.weights import Array


def dft(logp: Array) -> Array:
    """-sg(p) log p: dynamic fine-tuning (arXiv 2508.05629), as TRL 1.16's `dft`.

    The gradient of -log p with the weight of an improbable token taken down; summed and
    divided as the plain loss is.
    """
    return -jnp.exp(jax.lax.stop_gradient(logp)) * logp


def label_smoothed(logp: Array, mean_logp: Array, *, label_smoothing: Scalar) -> Array:
    """-(1 - eps) log p - eps mean_v log p_v, as transformers' `LabelSmoother`.

    The cross-entropy with targets of 1 - eps on the token and eps spread over the whole
    vocabulary (Szegedy et al., arXiv 1512.00567).

    Args:
      logp: of the target.
      mean_logp: the mean of log p_v over the vocabulary.
      label_smoothing: eps, in [0, 1).
    """
    return -(1 - label_smoothing) * logp - label_smoothing * mean_logp
