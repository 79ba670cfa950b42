"""NEFTune (arXiv 2310.05914): noise on the embeddings of what is trained on."""

import jax
import jax.numpy as jnp

from ftjax.weights import Array


def noise(key: Array, segments_BT: Array, d_model: int, alpha: float) -> Array:
    """U(-1, 1) * alpha / sqrt(L D) for each embedding, float32 [B, T, D]; 0 in padding.

    L is the length of the document in the row, not that of the row: as in the paper's
    code, where rows are padded (TRL counts the padding too).

    Args:
      key: of the step.
      segments_BT: which document a token is of; 0 is padding.
      d_model: D.
      alpha: 5, 10 or 15 in the paper.
    """
    there_BT = segments_BT > 0
    length_BT = jax.vmap(_lengths)(segments_BT)
    size_BT = alpha / jnp.sqrt(length_BT.astype(jnp.float32) * d_model)
    shape = (*segments_BT.shape, d_model)
    uniform = jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)
    return uniform * jnp.where(there_BT, size_BT, 0)[..., None]


def _lengths(segments_T: Array) -> Array:
    """How many tokens of the row are of the same segment as each."""
    size = segments_T.shape[0] + 1
    ones = jnp.ones_like(segments_T)
    return jax.ops.segment_sum(ones, segments_T, num_segments=size)[segments_T]
