"""One tensor into its place in a leaf, every value looked at on the way."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ftjax.checkpoints.tensors import Tensor
from ftjax.errors import UserError
from ftjax.models.names import Weight

# The bits of the exponent: all of them set means NaN or infinity.
_EXPONENT: dict[str, tuple[Any, int]] = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}
_BLOCK = 2**21  # elements; bounds the temporaries of one step


def fill(
    row: np.ndarray,
    weight: Weight,
    tensor: Tensor,
    name: str,
    note: Callable[[str], None],
) -> None:
    """Copies one tensor into its place, block by block, and looks at every value."""
    source = tensor.read()
    # A matrix is stored [outputs, inputs] and kept the other way round.
    shape = (-1, source.shape[0]) if weight.inputs else source.shape
    flat = row.reshape(shape)
    unsigned, mask = _EXPONENT[tensor.dtype]
    bits = source.view(unsigned)
    step = max(1, _BLOCK // max(1, source.size // source.shape[0]))
    bad, any_set, narrower = 0, False, row.itemsize < source.itemsize
    for i in range(0, source.shape[0], step):
        block, raw = source[i : i + step], bits[i : i + step]
        part = flat[:, i : i + step] if weight.inputs else flat[i : i + step]
        bad += int(np.count_nonzero((raw & unsigned(mask)) == unsigned(mask)))
        any_set = any_set or bool(raw.any())
        with np.errstate(over="ignore", invalid="ignore"):
            part[...] = block.T if weight.inputs else block
        if narrower and not bad:
            bad += int(np.count_nonzero(~np.isfinite(part)))
    if bad:
        raise UserError(
            f"a weight holds {bad:,} values that are NaN or infinite",
            where=f"{tensor.file}: {name}",
            expected=f"finite numbers in the range of {row.dtype}",
            got=f"{bad:,} of {source.size:,}",
            fix="use a checkpoint from before the run diverged, or download it again",
        )
    if weight.inputs and not any_set:
        note(f"{tensor.file}: {name} is all zero")
