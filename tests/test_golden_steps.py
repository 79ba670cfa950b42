"""Three optimizer steps of SFT equal those of torch, transformers and PEFT."""

from pathlib import Path

import numpy as np
import pytest

from ftjax.objectives.causal import causal
from tests.golden_steps import check_steps, golden, start
from tests.goldens import make_steps

LENGTH = 20


def batch(micro: int) -> dict[str, np.ndarray]:
    """The golden rows, padded, as `micro` micro-batches."""
    names = ("tokens", "targets", "positions", "segments")
    made = make_steps.rows()
    out = {name: np.zeros((len(made), LENGTH), np.int32) for name in names}
    out["weights"] = np.zeros((len(made), LENGTH), np.float32)
    for row, (ids, prompt) in enumerate(made):
        n = len(ids) - 1
        out["tokens"][row, :n], out["targets"][row, :n] = ids[:-1], ids[1:]
        out["positions"][row, :n], out["segments"][row, :n] = np.arange(n), 1
        out["weights"][row, prompt - 1 : n] = 1
    return {k: v.reshape(micro, -1, LENGTH) for k, v in out.items()}


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_steps_equal_torch(method: str, micro: int, tmp_path: Path) -> None:
    begun = start(tmp_path, method)
    made, rows = causal(begun.model, chunk=8), batch(micro)
    expected = golden("steps.json")["methods"][method]
    check_steps(begun, begun.frozen, made, rows, expected)
