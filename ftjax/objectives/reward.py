"""A reward model: one number for an answer, from pairs; see `losses.reward`.

The number is read at the last token of a sequence, which rows of this task therefore
hold (as an input, not only as a target).
"""

from typing import Any

import jax.numpy as jnp

from ftjax.losses.reward import extremes, metrics, reward
from ftjax.losses.sums import Sums
from ftjax.methods.heads import SCORE, read_head
from ftjax.models.decoder import Decoder, hidden_and_head
from ftjax.objectives import rows
from ftjax.step import Objective
from ftjax.weights import Array

PyTree = Any
HEAD = SCORE  # what this task trains beside a method


def reward_model(model: Decoder, config: Any) -> Objective:
    """The Bradley-Terry loss of each pair, and its centering.

    Args:
      model: without its head of logits.
      config: `loss` of `configs/reward.py`: center.
    """

    def loss(policy: PyTree, frozen: PyTree, batch: PyTree, key: Any = None) -> Sums:
        del frozen
        real = batch["pair"]
        chosen, rejected = scores(model, policy, batch, rows.PAIR, key)
        margin = batch["margin"]
        each = reward(chosen, rejected, margin=margin, center=config.center) * real
        low, high = extremes(chosen, rejected, real > 0)
        means = rows.means(metrics(chosen, rejected), real)
        most = {"max_reward": high, "-min_reward": -low}
        return Sums({"preference": jnp.sum(each)}, means, most)

    return Objective(loss, {"preference": lambda batch: batch["pair"]})


def scores(
    model: Decoder, policy: PyTree, batch: PyTree, members: int, key: Any = None
) -> Array:
    """The reward of each member of each group: [members, B, groups]; 0 where none."""
    hidden, _ = hidden_and_head(model, policy, batch, key)
    each_BT = read_head(hidden, policy[HEAD])
    last_BT = ends(batch["segments"])
    groups = batch["pair"].shape[-1]
    found = rows.group_sums(
        jnp.where(last_BT, each_BT, 0), batch["segments"], groups, members
    )
    return jnp.moveaxis(found, -1, 0)


def ends(segments_BT: Array) -> Array:
    """Whether a token is the last of its segment: bool [B, T]."""
    after_BT = jnp.pad(segments_BT, ((0, 0), (0, 1)))[:, 1:]
    return (segments_BT > 0) & (segments_BT != after_BT)
