"""Makes adam8.json: three steps of bitsandbytes' AdamW8bit on the CPU.

Run by hand, from the root of the repository, in an environment that has it:

    python -m tests.goldens.make_adam8

The codes are those of its portable quantizer, the nearest value in the table. Its CPU
kernel (0.50) looks them up in bins instead, and is off by up to 3e-5 of the largest
number of a block: zero becomes 2e-5 of it.

The weight is larger than what bitsandbytes keeps in float32, and its last block is
short; the gradients span several orders of magnitude, and some are zero.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.goldens.weights import exact, random_tensor

OUT = Path(__file__).parent / "adam8.json"
SHAPE = (20, 208)
OPTIM = {"lr": 0.01, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
STEPS = 3


def weight() -> np.ndarray:
    return random_tensor("adam8.weight", SHAPE)


def gradient(step: int) -> np.ndarray:
    rows = np.logspace(-5, 0, SHAPE[0], dtype=np.float32)[:, None]
    rows[3] = 0
    return (random_tensor(f"adam8.grad{step}", SHAPE) * rows).astype(np.float32)


def use_portable_quantizer() -> None:
    """Has the optimizer call the kernel that is registered for any device."""
    import torch
    from bitsandbytes.backends.cpu import ops

    key = torch._C.DispatchKey.CompositeExplicitAutograd
    quantize = torch.ops.bitsandbytes.quantize_blockwise.default

    def portable(values: Any, code: Any, scale: Any, out: Any, block: int) -> None:
        codes, largest = quantize._op_dk(key, values, code, block)
        out.copy_(codes)
        scale.copy_(largest)

    ops._quant_blockwise_fp32_direct = portable


def main() -> None:
    import bitsandbytes
    import torch
    from bitsandbytes.functional import create_dynamic_map

    use_portable_quantizer()
    w = torch.nn.Parameter(torch.from_numpy(weight()))
    tx = bitsandbytes.optim.AdamW8bit(
        [w],
        lr=OPTIM["lr"],
        betas=(OPTIM["b1"], OPTIM["b2"]),
        eps=OPTIM["eps"],
        weight_decay=OPTIM["weight_decay"],
    )
    for step in range(STEPS):
        w.grad = torch.from_numpy(gradient(step))
        tx.step()
    state: dict[str, Any] = tx.state[w]
    moved = w.detach().numpy()
    golden = {
        "versions": {"bitsandbytes": bitsandbytes.__version__},
        "unsigned_map": exact(create_dynamic_map(signed=False).numpy()),
        "mu": state["state1"].numpy().tobytes().hex(),
        "nu": state["state2"].numpy().tobytes().hex(),
        "mu_scale": state["absmax1"].tolist(),
        "nu_scale": state["absmax2"].tolist(),
        "every_41st_weight": moved.reshape(-1)[::41].tolist(),
        "sum_of_squares": float((moved.astype(np.float64) ** 2).sum()),
    }
    OUT.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
