"""The shipped base, from scratch: causal LM on the English that comes with Python.

    python -m ftjax.train --config=configs/pretrain.py --workdir=runs/pretrain

The architecture and the tokenizer are those in `ftjax/base`; the weights start random.
Its model card, `ftjax/base/README.md`, says what came out.
"""

from ml_collections import ConfigDict

from configs.common import base_config, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    c = base_config(parse_arg(arg, model="base", method="full"))
    c.task = "generic"
    c.model.from_scratch = True
    c.data.train = "pydoc:text[train]"
    c.data.max_length = 512
    c.optim.lr = 2.5e-3
    c.optim.warmup = 100
    c.optim.final = 0.02
    c.optim.b2 = 0.95
    c.optim.weight_decay = 1.0  # many epochs over little text
    c.train.steps = 2000
    c.train.batch_size = 4
    c.train.log_every = 20
    c.train.eval_every = 100
    c.train.save_every = 500
    return c
