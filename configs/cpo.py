"""Contrastive preference optimization: pairs, without a reference.

    python -m ftjax.train --config=configs/cpo.py:model=PATH,method=lora \\
        --config.data.train=FILE --workdir=runs/cpo

Rows have `prompt`, `chosen` and `rejected`, texts or messages.
"""

from ml_collections import ConfigDict

from configs.common import base_config, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    chosen = parse_arg(arg, model="base", method="lora")
    c = base_config(chosen)
    c.task = "cpo"
    c.data.train = "pydoc:preferences[train]"
    c.optim.lr = 1e-6 if chosen.method in ("full", "freeze") else 5e-5
    c.loss.type = "sigmoid"  # hinge (SLiC), ipo, simpo
    c.loss.beta = 0.1
    c.loss.nll_weight = 1.0  # of the likelihood of the chosen answers
    c.loss.label_smoothing = 0.0  # of sigmoid and simpo
    c.loss.gamma = 0.5  # of simpo: the margin that is aimed at
    c.loss.alpha = 0.0  # of the reward of AlphaPO; 0: the log-probability
    return c
