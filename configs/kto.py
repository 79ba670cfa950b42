"""Kahneman-Tversky optimization: answers that are rated good or bad, one by one.

    python -m ftjax.train --config=configs/kto.py:model=PATH,method=lora \\
        --config.data.train=FILE --workdir=runs/kto

Rows have `prompt`, `completion` and `label` (true or false); pairs count as one good
and one bad answer. The loss starts at 0.5.
"""

from ml_collections import ConfigDict

from configs.common import base_config, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    chosen = parse_arg(arg, model="base", method="lora")
    c = base_config(chosen)
    c.task = "kto"
    c.data.train = "pydoc:preferences[train]"
    c.optim.lr = 1e-6 if chosen.method in ("full", "freeze") else 5e-5
    c.loss.type = "kto"  # apo_zero_unpaired: without the estimate of the divergence
    c.loss.beta = 0.1
    c.loss.desirable_weight = 1.0  # of good answers; raise it where they are few
    c.loss.undesirable_weight = 1.0
    c.loss.reference = "base"  # the model without its update; or a checkpoint
    c.loss.precompute = False  # its log-probabilities once, before the run
    return c
