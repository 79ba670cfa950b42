"""What stands in for models and trainers where TRL's own methods make the goldens."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np


def numbers(x: Any) -> Any:
    """Eight digits of a number, or of those in a list."""
    if isinstance(x, list):
        return [numbers(y) for y in x]
    return float(f"{float(x):.8g}")


def leaf(array: Any) -> Any:
    """A tensor that gradients are asked for."""
    import torch

    return torch.tensor(np.asarray(array, np.float32), requires_grad=True)


def found(loss: Any, *leaves: Any) -> dict[str, Any]:
    """The loss, and its gradient for each leaf."""
    import torch

    grads = torch.autograd.grad(loss, leaves)
    return {
        "loss": numbers(loss.detach()),
        "grads": [numbers(g.tolist()) for g in grads],
    }


def trainer(**settings: Any) -> Any:
    """What stands in for a trainer: one process, no extras, and these settings."""
    import torch

    made = MagicMock()
    for name in ("gather", "gather_for_metrics"):
        setattr(made.accelerator, name, lambda x: x)
    made.accelerator.reduce = lambda x, reduction: x
    made.accelerator.device = torch.device("cpu")
    made.accelerator.num_processes = 1
    made._metrics = {"train": defaultdict(list)}
    made._total_train_tokens, made._tp_size = 0, 1
    made.aux_loss_enabled = False
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def metrics(trainer: Any) -> dict[str, float]:
    """What the trainer has logged."""
    return {name: numbers(x[-1]) for name, x in trainer._metrics["train"].items()}


def outputs(logps: Any) -> Any:
    """What a model gives whose log-probabilities are these."""
    import torch

    zeros = torch.zeros(logps.shape)
    # The fused head gives 0 where there is no label, and no gradient.
    return SimpleNamespace(
        log_probs=logps * (logps != 0),
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )


def batch(lengths: Any) -> dict[str, Any]:
    """Rows of one prompt token and a completion."""
    import torch

    mask = np.arange(max(lengths) + 1) <= np.asarray(lengths)[:, None]
    attention = torch.tensor(mask.astype(int))
    completion = attention.clone()
    completion[:, 0] = 0
    return {
        "input_ids": torch.zeros_like(attention),
        "attention_mask": attention,
        "completion_mask": completion,
    }


def standing_in(leaf: Any, other: Any = None) -> Any:
    """A model of fixed log-probabilities; `other` where the ids are ones."""

    def model(input_ids: Any, **_: Any) -> Any:
        return outputs(other if bool(input_ids.any()) else leaf)

    return model
