"""Quantized checkpoints against the real bitsandbytes and transformers, both ways.

Run by hand, from the root of the repository; the tests need neither:

    python -m tests.goldens.check_quant ours DIR      # jax: writes them, and our logits
    python -m tests.goldens.check_quant theirs DIR    # torch: loads them, compares, and
                                                      # writes some of its own
    python -m tests.goldens.check_quant back DIR      # jax: reads those, and compares

Logits are float32. bitsandbytes rounds the activations of its 8-bit layers to 8 bits
too, and its 4-bit ones are less exact on a CPU ("as it runs", shown only): what is
compared are the weights that its layers hold, dequantized.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.goldens.commands import run

IDS = [1, 11, 3, 9, 29, 31, 15, 13, 25, 19, 27, 17]
TOLERANCE = 2e-5
CASES: dict[str, list[str]] = {
    "nf4": ["--format=nf4"],
    "nf4-double": ["--format=nf4", "--double_quant"],
    "fp4": ["--format=fp4", "--group=128"],
    "nf4-some": ["--format=nf4", "--pattern=q_proj=none"],
    "int8": ["--format=int8"],
}
THEIRS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}


def ours(folder: Path) -> None:
    from tests.tiny import make_tiny_checkpoint

    # Rows of 128 numbers: for shorter ones the CPU kernel of bitsandbytes 0.50 takes
    # the scale of the first block for all of them.
    base = make_tiny_checkpoint(
        folder / "base", hidden_size=128, intermediate_size=256, attention_bias=True
    )
    for name, flags in CASES.items():
        out = folder / "ours" / name
        command = [f"--model={base}", f"--out={out}", "--data=none", *flags]
        subprocess.run([sys.executable, "-m", "ftjax.quantize", *command], check=True)
        np.save(folder / f"ours-{name}.npy", our_logits(out))


def our_logits(folder: Path) -> np.ndarray:
    return our_policy_logits(model=str(folder))


def our_policy_logits(**source: Any) -> np.ndarray:
    """Of what `open_policy` opens."""
    import jax.numpy as jnp

    from ftjax.policy import open_policy

    policy = open_policy(dtype=jnp.float32, **source)
    tokens = jnp.asarray([IDS], jnp.int32)
    rows = (tokens, jnp.arange(len(IDS))[None], jnp.ones_like(tokens))
    return np.asarray(policy.model.apply(policy.variables, *rows, method="logits")[0])


def theirs(folder: Path) -> None:
    import bitsandbytes
    import torch
    import transformers

    plain = logits(load(folder / "base"))
    worst = 0.0
    for name in CASES:
        model = load(folder / "ours" / name)
        kinds = sorted({type(m).__name__ for m in model.modules() if "bit" in str(m)})
        wanted = np.load(folder / f"ours-{name}.npy")
        apart = float(np.abs(logits(dense(model)) - wanted).max())
        # A model of its own: to run one packs its weights anew.
        running = logits(load(folder / "ours" / name))
        as_it_runs = float(np.abs(running - wanted).max())
        moved = float(np.abs(plain - wanted).max())
        print(
            f"{name}: max |logit difference| {apart:.1e} (as it runs:"
            f" {as_it_runs:.1e}); quantization moves them by {moved:.2f}"
        )
        print(f"  modules: {', '.join(kinds)}")
        assert moved > 0.01
        worst = max(worst, apart)
    for name, settings in THEIRS.items():
        config = transformers.BitsAndBytesConfig(**settings)
        model = load(folder / "base", quantization_config=config, device_map="cpu")
        model.save_pretrained(folder / "theirs" / name)
        transformers.AutoTokenizer.from_pretrained(folder / "base").save_pretrained(
            folder / "theirs" / name
        )
        np.save(folder / f"theirs-{name}.npy", logits(dense(model)))
    versions = (torch, transformers, bitsandbytes)
    print(f"worst {worst:.1e};", *(f"{v.__name__} {v.__version__}" for v in versions))
    assert worst < TOLERANCE


def dense(model: Any) -> Any:
    """The model with plain layers that hold what its quantized ones stand for."""
    import torch
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear8bitLt):
                scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
                weight = layer.weight.data.float() * (scale[:, None] / 127)
            elif isinstance(layer, Linear4bit):
                state = layer.weight.quant_state
                assert state.dtype == torch.float32
                weight = functional.dequantize_4bit(layer.weight.data, state)
            else:
                continue
            plain = torch.nn.Linear(layer.in_features, layer.out_features)
            plain.weight.data, plain.bias = weight, layer.bias
            setattr(parent, name, plain)
    return model


def back(folder: Path) -> None:
    worst = 0.0
    for name in THEIRS:
        found = our_logits(folder / "theirs" / name)
        apart = float(np.abs(found - np.load(folder / f"theirs-{name}.npy")).max())
        config = json.loads((folder / "theirs" / name / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "bitsandbytes"
        print(f"theirs {name}: max |logit difference| {apart:.1e}")
        worst = max(worst, apart)
    assert worst < TOLERANCE


def load(folder: Path, **settings: Any) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **settings
    ).eval()


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float().numpy()


if __name__ == "__main__":
    run(ours, theirs, back)
