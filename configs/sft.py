"""Supervised fine-tuning on instructions and responses, or on any rows TRL's SFT takes.

    python -m ftjax.train --config=configs/sft.py:model=PATH,method=lora \\
        --config.data.train=FILE --workdir=runs/mine

Without a model and data it tunes the shipped base on questions about the standard
library: `make demo`. method=full wants a smaller rate: --config.optim.lr=2e-5.

A message may say how much it counts: `weight` (0: nothing), or `train`, true or false.
"""

from ml_collections import ConfigDict

from configs.common import base_config, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    chosen = parse_arg(arg, model="base", method="lora")
    c = base_config(chosen)
    c.task = "sft"
    c.data.train = "pydoc:instructions[train]"
    # VeRA's paper has ten times LoRA's rate.
    rates = {"full": 2e-5, "freeze": 2e-5, "vera": 2e-3}
    c.optim.lr = rates.get(chosen.method, 2e-4)
    c.loss.type = "nll"  # dft: improbable tokens count less
    c.loss.label_smoothing = 0.0  # of nll
    c.loss.neftune_alpha = 0.0  # noise on the embeddings, such as 5; 0: none
    return c
