"""Makes loftq.json: PEFT's LoftQ start of one small weight, and a product with it.

Run by hand, from the root of the repository, in an environment with peft, bitsandbytes:

    python -m tests.goldens.make_loftq
"""

import json
from pathlib import Path
from typing import Any
from unittest import mock

from tests.goldens.weights import quant_cases, random_tensor

OUT = Path(__file__).parent / "loftq.json"
RANK, ROWS = 3, 4


def main() -> None:
    import bitsandbytes
    import peft
    import torch
    from peft.utils import loftq_utils

    to = torch.Tensor.to

    def on_cpu(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """PEFT asks for a GPU by name; bitsandbytes needs none."""
        args = tuple("cpu" if arg == "cuda" else arg for arg in args)
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return to(tensor, *args, **kwargs)

    weight = torch.from_numpy(quant_cases()["plain"])
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=False, quant_type="nf4"
    )
    codes = mock.Mock(data=packed, quant_state=state)
    with mock.patch.object(torch.Tensor, "to", on_cpu):
        right, left = loftq_utils._loftq_init_new(codes, weight, 4, RANK)
    dense = bitsandbytes.functional.dequantize_4bit(packed, state)
    x = torch.from_numpy(random_tensor("loftq.x", (ROWS, weight.shape[1])))
    found = {
        "update": (left @ right)[:ROWS].numpy().round(6).tolist(),
        "y": (x @ (dense + left @ right).T).numpy().round(6).tolist(),
        "left": float((weight - dense - left @ right).norm()),
        "error": float((weight - dense).norm()),
    }
    versions = {
        "peft": peft.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "torch": torch.__version__,
    }
    text = json.dumps({"versions": versions, **found}, separators=(",", ":"))
    OUT.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {OUT}: {found['error']:.4f} -> {found['left']:.4f}, {versions}")


if __name__ == "__main__":
    main()
