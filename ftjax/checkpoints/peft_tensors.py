"""Tensors of an adapter, taken one by one, so that none is left over unseen."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ftjax.checkpoints import peft
from ftjax.checkpoints.tensors import FLOATS, Tensor
from ftjax.errors import UserError


def take(
    left: dict[str, Tensor], key: str, shape: tuple[int, ...], folder: Path
) -> np.ndarray:
    """A tensor's values; it is no longer among those that are left."""
    tensor = left.pop(key, None)
    fits = tensor is not None and tensor.dtype in FLOATS and tensor.shape == shape
    if tensor is None or not fits:
        got = "no such tensor"
        if tensor is not None:
            got = f"{tensor.dtype} {list(tensor.shape)}"
        raise UserError(
            "the adapter does not fit this model",
            where=f"{folder / peft.TENSORS}: {key}",
            expected=f"floats {list(shape)}",
            got=got,
            fix="pass the model that the adapter was trained on",
        )
    return peft.finite(tensor)


def nothing_left(left: Mapping[str, Tensor], folder: Path) -> None:
    if left:
        raise UserError(
            "the adapter has a tensor that this model has no place for",
            where=f"{folder / peft.TENSORS}: {min(left)}",
            expected="only what its configuration targets",
            fix="pass the model that the adapter was trained on",
        )
