"""Response tuning: a reward model from accepted and rejected texts.

    python -m ftjax.train --config=configs/reward.py:model=PATH,method=lora \\
        --config.data.train=FILE --workdir=runs/reward

Rows have `chosen` and `rejected`, or AutoTrain's `text` and `rejected_text`, with or
without a `prompt`, and perhaps a `margin`. The loss starts at ln 2.
"""

from ml_collections import ConfigDict

from configs.common import base_config, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    chosen = parse_arg(arg, model="base", method="lora")
    c = base_config(chosen)
    c.task = "reward"
    c.data.train = "pydoc:preferences[train]"
    c.data.overlong = "drop"  # what is cut off may be what made it better
    c.optim.lr = 1e-5 if chosen.method in ("full", "freeze") else 1e-4
    c.train.sample_rows = 0  # a reward model writes nothing
    c.loss.center = 0.01  # keeps rewards around 0; 0: not
    return c
