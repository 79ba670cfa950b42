"""From rewards to what each token is told; and to how tokens are averaged."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ftjax.data.loader import Batch
from ftjax.losses.grpo import ADVANTAGES, REDUCTIONS, Tokens
from ftjax.losses.policy import k1
from ftjax.losses.ppo import gae, token_rewards, whiten
from ftjax.rl.answers import Answers

Metrics = dict[str, np.ndarray]


def of_groups(answers: Answers, batch: Batch, config: Any) -> tuple[Batch, Metrics]:
    """({'advantage': [n, T]}, metrics [n]) of GRPO: the completion's, at each token.

    Args:
      answers: the completions of each prompt in a row, `config.rollout.group` of them.
      batch: of them.
      config: of the run.
    """
    rewards_PG = answers.judged.total.reshape(-1, config.rollout.group)
    real_PG = ~np.isnan(rewards_PG)
    known = np.where(real_PG, rewards_PG, 0).astype(np.float32)
    made = ADVANTAGES[config.loss.scale](jnp.asarray(known), jnp.asarray(real_PG))
    each_n1 = np.asarray(made).reshape(-1, 1)
    return {"advantage": each_n1 * batch["weights"]}, spread(rewards_PG)


def of_values(answers: Answers, batch: Batch, config: Any) -> tuple[Batch, Metrics]:
    """({'advantage', 'return': [n, T]}, metrics [n]) of PPO.

    The completion's reward comes at its last token; every token pays for its KL (k1).
    Advantages are whitened over the rollout.

    Args:
      answers: the completions.
      batch: of them, with `old_logp` and `old_value`, and `ref_logp` where the KL has a
        price.
      config: of the run.
    """
    loss, mask = config.loss, batch["weights"] > 0
    goes_on = mask & np.pad(mask[:, 1:], ((0, 0), (0, 1)))
    total = np.nan_to_num(answers.judged.total).astype(np.float32)
    score = np.where(mask & ~goes_on, total[:, None], np.float32(0))
    old = batch["old_logp"]
    kl = k1(jnp.asarray(old), jnp.asarray(batch.get("ref_logp", old)))
    rewards = token_rewards(jnp.asarray(score), kl, kl_coef=loss.beta)
    found = gae(
        rewards,
        jnp.asarray(batch["old_value"]),
        jnp.asarray(mask),
        jnp.asarray(goes_on),
        gamma=loss.gamma,
        lam=loss.lam,
    )
    white = whiten(found.advantage_BT, jnp.asarray(mask))
    leaves = {"advantage": white, "return": found.return_BT}
    told = {
        **spread(answers.judged.total[None]),
        "objective/kl": np.asarray(kl, np.float64).sum(1),
        "objective/rlhf_reward": np.asarray(rewards, np.float64).sum(1),
    }
    return {name: np.asarray(x) for name, x in leaves.items()}, told


def spread(rewards_PG: np.ndarray) -> Metrics:
    """How rewards differ within a group, told of each completion: [n].

    PPO has no groups: all of its completions are one.
    """
    count = (~np.isnan(rewards_PG)).sum(1, keepdims=True)
    mean = np.nansum(rewards_PG, 1, keepdims=True) / np.maximum(count, 1)
    squares = np.nansum((rewards_PG - mean) ** 2, 1, keepdims=True)
    std_P1 = np.sqrt(squares / np.maximum(count - 1, 1))
    std = np.broadcast_to(std_P1, rewards_PG.shape).reshape(-1)
    return {"reward_std": std, "frac_reward_zero_std": (std < 1e-8).astype(np.float64)}


def shares(weights: np.ndarray, config: Any, parts: int, longest: int) -> Batch:
    """`share` [n, T] and `total` [n] of a step: how its tokens are averaged.

    Args:
      weights: [n, T], 1 at tokens that are trained on.
      config: `loss` of `configs/grpo.py`: type.
      parts: micro-batches, which only BNPO weighs apart.
      longest: new tokens that a completion may have.
    """
    share, total = [], []
    for mask in np.split(weights, parts):
        length = np.broadcast_to(mask.sum(1, keepdims=True), mask.shape)
        count = jnp.asarray(float(len(mask)))
        tokens = Tokens(jnp.asarray(mask), jnp.asarray(length), count)
        found = REDUCTIONS[config.type](tokens, longest)
        share.append(np.asarray(found.token))
        total.append(np.full(len(mask), float(found.total) / len(mask), np.float32))
    return {"share": np.concatenate(share), "total": np.concatenate(total)}
