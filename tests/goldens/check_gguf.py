"""GGUF files, read back by the `gguf` package: the same tensors, the same vocabulary.

Run by hand, from the root of the repository, where `gguf` is installed too:

    python -m tests.goldens.check_gguf DIR
"""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.checkpoints.gguf import gguf_name, reordered
from ftjax.loading import open_base
from ftjax.models.names import model_weights
from tests.tiny import FAMILIES, make_tiny_checkpoint

# Of the largest number in a block of 32: half a step, and the scale is a float16.
STEPS = {
    "F32": 0.0,
    "F16": 2.0**-11,
    "Q8_0": 0.51 / 127 + 2**-11,
    "Q4_0": 1 / 8 + 2**-9,
}


def main(folder: Path) -> None:
    import gguf

    for family in FAMILIES:
        model = make_tiny_checkpoint(folder / family, family, vocab_size=288)
        base = open_base(str(model), note=lambda _: None)
        for kind in ("f16", "q8_0", "q4_0"):
            out = folder / f"{family}-{kind}"
            command = [f"--model={model}", "--to=gguf", f"--dtype={kind}"]
            module = [sys.executable, "-m", "ftjax.export", *command, f"--out={out}"]
            subprocess.run(module, check=True)
            found = gguf.GGUFReader(out / "model.gguf")
            worst = compare(gguf, found, base)
            words = found.fields["tokenizer.ggml.tokens"].contents()
            assert len(words) == base.spec.vocab_size
            ids = base.tokenizer.encode(["the thing"], add_special=False)[0]
            assert "".join(words[i] for i in ids) == "theĠthing"
            print(f"{family} {kind}: {len(found.tensors)} tensors, worst {worst}")
    print(f"gguf {version('gguf')}: all as written")


def compare(gguf: Any, found: Any, base: Any) -> dict[str, float]:
    """The largest error of each type, as a share of what the type allows."""
    stored = {tensor.name: tensor for tensor in found.tensors}
    worst: dict[str, float] = {}
    names = [n for weight in model_weights(base.spec).values() for n in weight.names]
    assert stored.keys() == {gguf_name(name) for name in names}
    for name in names:
        tensor = stored[gguf_name(name)]
        values = base.weights.tensors[name].read()
        wanted = reordered(values, name, base.spec)
        kind = tensor.tensor_type.name
        got = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert got.shape == wanted.shape, (name, got.shape)
        error = np.abs(got.astype(np.float32) - wanted)
        width = 32 if error.shape[-1] % 32 == 0 else 1
        largest = np.abs(wanted).reshape(-1, width).max(1, keepdims=True)
        allowed = STEPS[kind] * largest + (0 if kind == "F32" else 1e-7)
        assert (error.reshape(-1, width) <= allowed).all(), (name, kind)
        worst[kind] = max(worst.get(kind, 0.0), float(error.max()))
    return worst


if __name__ == "__main__":
    main(Path(sys.argv[1]))
