"""Simple preference optimization: pairs, means over tokens, a margin, no reference.

    python -m ftjax.train --config=configs/simpo.py:model=PATH,method=lora \\
        --config.data.train=FILE --workdir=runs/simpo

The paper's loss; TRL adds the likelihood of the chosen answers unless it is told not to
(here `loss.nll_weight`).
"""

from ml_collections import ConfigDict

from configs import cpo


def get_config(arg: str = "") -> ConfigDict:
    c = cpo.get_config(arg)
    c.task = "simpo"
    c.loss.type = "simpo"
    c.loss.beta = 2.0
    c.loss.gamma = 1.0
    c.loss.nll_weight = 0.0
    return c
