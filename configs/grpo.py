"""Group relative policy optimization: answers are sampled, and judged by a reward.

    python -m ftjax.train --config=configs/grpo.py:model=PATH,method=lora \\
        --config.data.train=FILE --config.reward.function=module:function \\
        --workdir=runs/grpo

Rows have a `prompt`, text or messages; other columns go to the reward, which is
`f(prompts, completions, **columns)` and gives a number per completion; or a reward
model, `--config.reward.model=RUN`, alone or beside functions. Without a model and data
it teaches the shipped base to answer in so many words. The loss says nothing: watch
`reward`.
"""

from ml_collections import ConfigDict

from configs.common import parse_arg
from configs.online import online_config


def get_config(arg: str = "") -> ConfigDict:
    chosen = parse_arg(arg, model="base", method="lora")
    c = online_config(chosen)
    c.task = "grpo"
    c.loss.type = "dapo"  # how tokens are averaged: dapo, grpo, bnpo, dr_grpo
    c.loss.scale = "group"  # of advantages: group, batch, none; leave_one_out (RLOO)
    c.loss.beta = 0.0  # how much a step away from the reference costs
    return c
