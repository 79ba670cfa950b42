"""General fine-tuning: causal language modelling on plain text, every token learned.

    python -m ftjax.train --config=configs/generic.py:model=PATH,method=full \\
        --config.data.train=FILE --workdir=runs/generic

Rows have `text`; a .txt file is one document, or many between lines that hold
`data.separator` alone. Continues the pretraining of any base.
"""

from ml_collections import ConfigDict

from configs.common import base_config, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    chosen = parse_arg(arg, model="base", method="lora")
    c = base_config(chosen)
    c.task = "generic"
    c.data.train = "pydoc:text[train]"
    c.optim.lr = 1e-4 if chosen.method in ("full", "freeze") else 5e-4
    return c
