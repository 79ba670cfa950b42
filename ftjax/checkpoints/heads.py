"""The head of a reward model in other people's files: `score.weight`, [1, D].

It is that of transformers' LlamaForSequenceClassification, and of its kin, with one
label. These have no head of logits, and read the score at the last token of a row that
is not `pad_token_id`; ftjax reads it at the last token of an answer. With a pad token
that no answer ends in, the two are one.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.checkpoints.fill import fill
from ftjax.checkpoints.tensors import FLOATS, Entry, Tensor
from ftjax.errors import UserError
from ftjax.models.names import Weight
from ftjax.models.registry import scorer_of
from ftjax.models.spec import ModelSpec

NAME = "score.weight"
LOGITS = "lm_head.weight"
LABEL = "LABEL_0"  # transformers' name of the only one


def without_logits(spec: ModelSpec) -> ModelSpec:
    """The same model without an output head of its own; nothing asks it for logits."""
    return replace(spec, tied=True)


def split_head(
    folder: Path, spec: ModelSpec, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of the body, and the head of a reward model.

    Raises:
      UserError: no head, or one that gives more than one number.
    """
    head = tensors.get(NAME)
    if head is None or head.shape != (1, spec.d_model) or head.dtype not in FLOATS:
        got = f"{head.dtype} {list(head.shape)}" if head else "no such tensor"
        raise UserError(
            "this classifier is no reward model",
            where=f"{folder}: {NAME}",
            expected=f"floats {[1, spec.d_model]}: one number for a row",
            got=got,
            fix="use a model that was trained with num_labels=1",
        )
    rest = {n: tensor for n, tensor in tensors.items() if n not in (NAME, LOGITS)}
    return rest, head


def read_head(tensor: Tensor, note: Callable[[str], None]) -> dict[str, np.ndarray]:
    """The collection of a head, {'w': float32 [D]}, every value looked at."""
    size = tensor.shape[1]
    w_D1 = np.empty((size, 1), np.float32)
    fill(w_D1, Weight(NAME, (size, 1), inputs=1), tensor, NAME, note)
    return {"w": w_D1[:, 0]}


def head_entry(head: Mapping[str, Any], prefix: str = "") -> Entry:
    """The tensor of a head, to be written; always float32, of which it has D."""
    w_1D = np.asarray(head["w"], np.float32)[None]
    return Entry(f"{prefix}{NAME}", w_1D.shape, lambda: w_1D, w_1D.dtype)


def reward_config(
    config: Mapping[str, Any], spec: ModelSpec, pad: int | None
) -> dict[str, Any]:
    """The configuration of a model, as that of a reward model over it.

    Args:
      pad: a token that no answer ends in. None: transformers then takes one row at a
        time, and refuses more.
    """
    return {
        **config,
        "architectures": [scorer_of(spec.family)],
        "id2label": {"0": LABEL},
        "label2id": {LABEL: 0},
        "num_labels": 1,
        "pad_token_id": pad,
    }
