"""From packed rows to sequences and pairs: what every loss of sequences begins with.

Member m of M of group u in a row is segment M * u + m + 1; where the prompt of a pair
stands once, it is segment 3 u + 1 and its answers are the next two (see `data.loader`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.losses.sums import Term
from ftjax.losses.token_logps import TokenLogps, token_logps
from ftjax.models.decoder import Decoder, hidden_and_head
from ftjax.weights import Array

PyTree = Any
PAIR = 2  # members of a group


def logps(
    model: Decoder, variables: PyTree, batch: PyTree, chunk: int, key: Any = None
) -> TokenLogps:
    """The log-probability of every trained token; 0 for the others."""
    hidden, head = hidden_and_head(model, variables, batch, key)
    return token_logps(hidden, head, batch["targets"], batch["weights"], chunk)


def group_sums(x_BT: Array, segments_BT: Array, groups: int, members: int) -> Array:
    """The sum over the tokens of each member of each group: [B, groups, members]."""
    slots = groups * members

    def row(x_T: Array, segments_T: Array) -> Array:
        # Slot 0 is the padding.
        return jax.ops.segment_sum(x_T, segments_T, num_segments=slots + 1)[1:]

    return jax.vmap(row)(x_BT, segments_BT).reshape(-1, groups, members)


def member_sums(x_BT: Array, batch: PyTree, groups: int) -> Array:
    """The sum over the tokens of both members of each group: [B, groups, 2]."""
    members = PAIR + _prompts(batch)
    return group_sums(x_BT, batch["segments"], groups, members)[..., -PAIR:]


def _prompts(batch: PyTree) -> int:
    """Segments that come before the members of a group: its prompt, or none."""
    return int("parents" in batch)


def pair_sums(x_BT: Array, batch: PyTree) -> tuple[Array, Array]:
    """Sums over the chosen and the rejected of each pair, each [B, U]; 0 elsewhere."""
    real_BU = batch["pair"]
    both = member_sums(x_BT, batch, real_BU.shape[-1])
    both = jnp.where(real_BU[..., None] > 0, both, 0)
    return both[..., 0], both[..., 1]


def member_of(batch: PyTree) -> tuple[Array, Array]:
    """(group, member) of each token, int32 [..., T]; of padding something.

    A prompt that stands once is member -1.
    """
    prompts = _prompts(batch)
    place = jnp.maximum(batch["segments"] - 1, 0)
    return place // (PAIR + prompts), place % (PAIR + prompts) - prompts


def of_group(values_BU: Array, group_BT: Array) -> Array:
    """The number of each token's group: [..., T]."""
    return jnp.take_along_axis(values_BU, group_BT, axis=-1)


def chosen_weights(batch: PyTree) -> Array:
    """1 for the answer's tokens of what is chosen in a pair: float32 [..., T]."""
    group, member = member_of(batch)
    chosen = (member == 0) & (of_group(batch["pair"], group) > 0)
    return jnp.where(chosen, batch["weights"], 0)


def means(values: Mapping[str, Array], weights: Array) -> dict[str, Term]:
    """A metric per pair as sums over all of them."""
    return {name: mean(x, weights) for name, x in values.items()}


def mean(values: Array, weights: Array) -> Term:
    """A metric as a sum over all that it is about."""
    return Term(jnp.sum(values * weights), jnp.sum(weights))


def side_metrics(tokens: TokenLogps, batch: PyTree) -> dict[str, Term]:
    """Of trained tokens, under TRL's names: logits, entropy, accuracy; no gradient.

    `logits/*` is the mean over the answer's tokens and the vocabulary;
    `mean_token_accuracy` and `entropy` are those of the chosen answers.
    """
    weights = batch["weights"]
    chosen = chosen_weights(batch)
    group, member = member_of(batch)
    worse = (member == 1) & (of_group(batch["pair"], group) > 0)
    rejected = jnp.where(worse, weights, 0)

    return {
        "logits/chosen": mean(tokens.mean_logit_BT, chosen),
        "logits/rejected": mean(tokens.mean_logit_BT, rejected),
        "entropy": mean(tokens.entropy_BT, chosen),
        "mean_token_accuracy": mean(tokens.correct_BT, chosen),
    }
