"""Proximal policy optimization: answers are sampled and judged, a head values states.

    python -m ftjax.train --config=configs/ppo.py:model=PATH,method=lora \\
        --config.data.train=FILE --config.reward.model=RUN --workdir=runs/ppo

Rows and rewards are those of `configs/grpo.py`. Each token also pays for how far it is
from the reference. Watch `reward` and `objective/kl`.
"""

from ml_collections import ConfigDict

from configs.common import parse_arg
from configs.online import online_config


def get_config(arg: str = "") -> ConfigDict:
    chosen = parse_arg(arg, model="base", method="lora")
    c = online_config(chosen)
    c.task = "ppo"
    c.rollout.group = 1
    c.rollout.passes = 4
    c.train.eval_every = 48  # between rollouts: a multiple of batches * passes
    c.loss.beta = 0.05  # the price of the KL to the reference, per token
    c.loss.gamma = 1.0  # the discount of what comes later
    c.loss.lam = 0.95  # of advantages: 0 trusts the values, 1 the rewards
    c.loss.value_weight = 0.1  # of the loss of the values
    c.loss.clip_value = 0.2  # how far a value may move in a rollout
    return c
