"""Distillation: a student learns the distribution of a teacher, token by token.

    python -m ftjax.train --config=configs/distill.py:model=PATH,method=lora \\
        --config.loss.teacher=PATH --config.data.train=FILE --workdir=runs/distill

Rows are those of supervised fine-tuning. Teacher and student share a tokenizer.
"""

from ml_collections import ConfigDict

from configs.common import base_config, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    chosen = parse_arg(arg, model="base", method="lora")
    c = base_config(chosen)
    c.task = "distill"
    c.data.train = "pydoc:instructions[train]"
    c.optim.lr = 2e-5 if chosen.method in ("full", "freeze") else 2e-4
    c.loss.teacher = ""  # a checkpoint, a preset or a Hub name
    c.loss.divergence = "forward_kl"  # reverse_kl, js_divergence
    c.loss.beta = 0.5  # of js_divergence: the teacher's share of the middle
    c.loss.temperature = 1.0
    c.loss.nll_weight = 0.0  # share of the likelihood of the data
    return c
