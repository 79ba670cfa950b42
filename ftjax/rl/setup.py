"""What a run that learns from rewards needs beside its model."""

from typing import Any

from ftjax.loading import Base, load_base
from ftjax.objectives.tasks import task_of
from ftjax.prepare import Prepared, random_params
from ftjax.rl.player import Player
from ftjax.rl.reward_model import RewardModel
from ftjax.rl.rewards import Judge
from ftjax.rl.rollouts import Rollouts

PyTree = Any


def open_rollouts(config: Any, ready: Prepared, frozen: PyTree) -> Rollouts | None:
    """The rollouts of a run, or None where its rows are stored.

    Args:
      config: of the run.
      ready: what it prepared.
      frozen: what is not trained.

    Raises:
      UserError: a reward that is not there or does not fit.
    """
    if not task_of(config.task).online:
        return None
    base, shape = ready.base, ready.shape
    judge = open_judge(
        config.reward,
        base,
        length=ready.data.length,
        rows=config.train.batch_size // config.train.accumulate,
        dtype=shape.dtype,
        mesh=ready.mesh,
    )
    player = Player(base, shape.dtype, config.seed, config.rollout, judge)
    return Rollouts(config, ready, frozen, _reference(config, ready, frozen), player)


def open_judge(reward: Any, base: Base, **place: Any) -> Judge:
    """The judge of `config.reward`; `place` is where a reward model is put."""
    return Judge(
        reward, RewardModel(reward.model, base, **place) if reward.model else None
    )


def _reference(config: Any, ready: Prepared, frozen: PyTree) -> PyTree | None:
    """The model as it began, where a loss or a limit compares with it.

    Where what is frozen is not the base, that is a second model in memory.
    """
    if config.loss.beta == 0 and config.loss.max_kl == 0:
        return None
    shape = ready.shape
    if shape.method.frozen_is_base:
        return frozen
    if config.model.from_scratch:
        return {"params": random_params(shape.model, config.seed, ready.mesh)}
    formats = shape.formats
    return load_base(ready.base, shape.param_dtype, ready.mesh, formats=formats)
