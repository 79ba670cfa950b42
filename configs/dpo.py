"""Direct preference optimization, and its relatives, on pairs of answers.

    python -m ftjax.train --config=configs/dpo.py:model=PATH,method=lora \\
        --config.data.train=FILE --workdir=runs/dpo

Rows have `prompt`, `chosen` and `rejected`, texts or messages. Without a model and data
it tunes the shipped base on questions about the standard library. The loss starts at
ln 2 and the margin at 0.
"""

from ml_collections import ConfigDict

from configs.common import base_config, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    chosen = parse_arg(arg, model="base", method="lora")
    c = base_config(chosen)
    c.task = "dpo"
    c.data.train = "pydoc:preferences[train]"
    c.optim.lr = 1e-6 if chosen.method in ("full", "freeze") else 5e-5
    c.loss.type = "sigmoid"  # or several: sigmoid,sft (RPO); the names are TRL's
    c.loss.type_weights = ""  # of these; empty: 1 each
    c.loss.beta = 0.1  # how much a step away from the reference costs
    c.loss.label_smoothing = 0.0  # of sigmoid (cDPO), robust, exo_pair and aot
    c.loss.divergence = "reverse_kl"  # forward_kl, js_divergence, alpha_divergence
    c.loss.alpha = 0.5  # of alpha_divergence
    c.loss.tau = 0.05  # of discopop
    c.loss.ld_alpha = 1.0  # LD-DPO: weight of tokens beyond the shorter answer
    c.loss.reference = "base"  # the model without its update; or a checkpoint
    c.loss.precompute = False  # its log-probabilities once, before the run
    return c
