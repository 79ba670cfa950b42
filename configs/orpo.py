"""Odds ratio preference optimization: imitation and preference at once, no reference.

    python -m ftjax.train --config=configs/orpo.py:model=PATH,method=lora \\
        --config.data.train=FILE --workdir=runs/orpo

Rows may be pairs (`prompt`, `chosen`, `rejected`), answers to imitate (`prompt`,
`completion`, or `messages`) and plain `text`, in any order and proportion; also halves
of pairs (`prompt` with `chosen` or `rejected` alone), joined within `data.join_window`.
They may come as a stream, from a pipe or a file that grows, with
`--config.data.stream=True --config.data.train=- --config.train.steps=1000`: what is
read is kept in the run's folder, so that the same command goes on after a kill.
"""

from ml_collections import ConfigDict

from configs.common import base_config, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    chosen = parse_arg(arg, model="base", method="lora")
    c = base_config(chosen)
    c.task = "orpo"
    c.data.train = "pydoc:preferences[train]"
    c.optim.lr = 8e-6 if chosen.method in ("full", "freeze") else 1e-4
    c.loss.beta = 0.1  # weight of the odds ratio (lambda in the paper)
    c.loss.nll_scope = "prompt+chosen"  # as TRL and the paper; chosen: the answer alone
    c.loss.answer_weight = 1.0  # of the tokens of answers to imitate
    c.loss.text_weight = 1.0  # of the tokens of plain text
    return c
