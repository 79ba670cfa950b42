"""Makes quant.json: codes, scales and values of bitsandbytes for small weights.

Run by hand, from the root of the repository, in an environment that has it:

    python -m tests.goldens.make_quant
"""

import json
from pathlib import Path
from typing import Any

from tests.goldens.weights import exact, quant_cases

OUT = Path(__file__).parent / "quant.json"


def table(weight: Any, name: str, double: bool, block: int) -> dict[str, Any]:
    import torch
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        torch.from_numpy(weight),
        blocksize=block,
        compress_statistics=double,
        quant_type=name,
    )
    # As one row: for rows shorter than a block the CPU kernel of 0.50 takes the first
    # block's scale for all of them.
    state.shape = torch.Size([weight.size])
    dense = functional.dequantize_4bit(packed, state)
    found: dict[str, Any] = {
        "packed": exact(packed.numpy()),
        "scale": exact(state.absmax.numpy()),
        "dense": exact(dense.numpy()),
    }
    if double:
        found["nested"] = exact(state.state2.absmax.numpy())
        found["offset"] = float(state.offset)
    return found


def int8(weight: Any) -> dict[str, Any]:
    import torch
    from bitsandbytes import functional

    codes, scale, _ = functional.int8_vectorwise_quant(torch.from_numpy(weight).half())
    return {
        "codes": exact(codes.numpy()),
        "scale": exact(scale.numpy()),
    }


def main() -> None:
    import bitsandbytes
    import torch

    cases: dict[str, Any] = {}
    for key, weight in quant_cases().items():
        cases[key] = {"int8": int8(weight)}
        for name in ("nf4", "fp4"):
            for double in (False, True):
                for block in (64, 128):
                    label = f"{name}-{block}{'-double' if double else ''}"
                    cases[key][label] = table(weight, name, double, block)
    versions = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}
    text = json.dumps({"versions": versions, "cases": cases}, sort_keys=True)
    OUT.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {OUT}: {len(cases)} weights, {versions}")


if __name__ == "__main__":
    main()
