"""Random weights that any machine makes alike from their names alone, with numpy.

So the golden numbers need no weights beside them: torch made the logits from these, and
the tests make the same checkpoint again.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 values that depend on `name` and `shape` only (Philox is specified)."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    bits = np.random.Generator(np.random.Philox(key=key))
    # Sums of uniform numbers: numpy may change how it draws normal ones.
    values = bits.random((4, *shape)).sum(0) - 2.0
    if name.endswith(("norm.weight", "magnitude_vector")):
        return (1.0 + 0.3 * values).astype(np.float32)
    if len(shape) == 2 and "embed" not in name:
        values *= 2.5 * shape[1] ** -0.5
    return values.astype(np.float32)


def write_random(path: Path, shapes: dict[str, list[int]], of: str = "") -> None:
    """A safetensors file with a random tensor for each name.

    `of` goes before the names that the values are made of: another model.
    """
    tensors = {name: random_tensor(of + name, tuple(s)) for name, s in shapes.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def write_adapter(folder: Path, case: dict[str, Any]) -> Path:
    """A PEFT adapter: its `config`, and a random tensor for each of its `tensors`.

    `same`, if there is one, says of a tensor whose values it has.
    """
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(case["config"]))
    same = case.get("same", {})
    tensors = {
        name: random_tensor(same.get(name, name), tuple(shape))
        for name, shape in case["tensors"].items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def exact(array: np.ndarray) -> str:
    """The bytes of an array in hex; their SHA-256 where that is shorter."""
    data = np.ascontiguousarray(array).tobytes()
    return data.hex() if len(data) <= 32 else hashlib.sha256(data).hexdigest()


def quant_cases() -> dict[str, np.ndarray]:
    """Weights [outputs, inputs] that try a quantizer: ties, zeros, partial blocks."""
    plain = random_tensor("quant.plain.weight", (16, 128))
    tied = np.zeros((4, 64), np.float32)
    grid = np.linspace(-1, 1, 64, dtype=np.float32)
    tied[0], tied[1] = grid, grid * np.float32(0.5)
    tied[2, ::2], tied[3, 5] = np.float32(-0.25), np.float32(3)
    tied[3, 6] = np.float32(-3 * 0.0052083334885537624 / 2)
    wide = random_tensor("quant.wide.weight", (40, 512)) ** 3
    return {
        "plain": plain,
        "ties": tied,
        "rows": random_tensor("quant.rows.weight", (12, 40)),
        "rest": random_tensor("quant.rest.weight", (7, 30)),
        "odd": random_tensor("quant.odd.weight", (5, 7)),
        "short": random_tensor("quant.short.weight", (1, 3)),
        "many": wide.astype(np.float32),
    }
