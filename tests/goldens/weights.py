"""Random weights that any machine makes alike from their names alone, with numpy.

So the golden numbers need no weights beside them: torch made the logits from these, and
the tests make the same checkpoint again.
"""

import hashlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 values that depend on `name` and `shape` only (Philox is specified)."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    bits = np.random.Generator(np.random.Philox(key=key))
    # Sums of uniform numbers: numpy may change how it draws normal ones.
    values = bits.random((4, *shape)).sum(0) - 2.0
    if name.endswith("norm.weight"):
        return (1.0 + 0.3 * values).astype(np.float32)
    if len(shape) == 2 and "embed" not in name:
        values *= 2.5 * shape[1] ** -0.5
    return values.astype(np.float32)


def write_random(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file with a random tensor for each name."""
    tensors = {name: random_tensor(name, tuple(s)) for name, s in shapes.items()}
    save_file(tensors, path, metadata={"format": "pt"})
