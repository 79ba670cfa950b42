"""General fine-tuning: causal language modelling on plain text, every token learned.

    python -m ftjax.train --config=configs/generic.py:model=PATH,method=full \\
        --config.data.train=FILE --workdir=runs/generic

Rows have `text`; a .txt file is one document, or many between lines that hold
`data.separator` alone (or, if it has newlines, wherever it stands: '\\n\\n' is a blank
line). Long texts are cut into windows, in which every token after the text's first is
predicted once. `data.join=True` is the other way to fill rows: all texts in one stream,
so that a window may begin with the end of another text, and sees it.

Continues the pretraining of any base, or begins it: --config.model.from_scratch=True.
"""

from ml_collections import ConfigDict

from configs.common import base_config, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    chosen = parse_arg(arg, model="base", method="lora")
    c = base_config(chosen)
    c.task = "generic"
    c.data.train = "pydoc:text[train]"
    c.data.separator = "<|endoftext|>"
    c.data.overlong = "split"
    c.loss.label_smoothing = 0.0
    c.optim.lr = 1e-4 if chosen.method in ("full", "freeze") else 5e-4
    return c
