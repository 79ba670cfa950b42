"""Makes loftq.json: PEFT's LoftQ start of one small weight, a product, its gradient.

After one turn of the alternation (`_loftq_init_new`), and after several (`loftq_init`).
Signs are free, so of the gradients b.da and db.a are kept.

Run by hand, from the root of the repository, in an environment with peft, bitsandbytes:

    python -m tests.goldens.make_loftq
"""

import json
from pathlib import Path
from typing import Any
from unittest import mock

from tests.goldens.weights import quant_cases, random_tensor

OUT = Path(__file__).parent / "loftq.json"
RANK, ROWS, TURNS = 3, 4, 5


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
    with (
        mock.patch.object(torch.Tensor, "to", on_cpu),
        mock.patch.object(bitsandbytes.nn.Params4bit, "to", quantized_on_cpu),
    ):
        right, left = loftq_utils._loftq_init_new(codes, weight, 4, RANK)
        after, right_n, left_n = loftq_utils.loftq_init(weight, 4, RANK, TURNS)
    dense = bitsandbytes.functional.dequantize_4bit(packed, state)
    found: dict[str, Any] = {
        "error": float((weight - dense).norm()),
        "one": measured(weight, dense, right, left),
        "turns": measured(weight, after, right_n, left_n),
        "codes_changed": float((after != dense).float().mean()),
    }
    versions = {
        "peft": peft.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "torch": torch.__version__,
    }
    text = json.dumps({"versions": versions, **found}, separators=(",", ":"))
    OUT.write_text(text + "\n", encoding="utf-8")
    left_over = ", ".join(f"{found[n]['left']:.4f}" for n in ("one", "turns"))
    print(f"wrote {OUT}: {found['error']:.4f} -> {left_over}, {versions}")


def quantized_on_cpu(weight: Any, *args: Any, **kwargs: Any) -> Any:
    """What moving a weight to a GPU does there: it is quantized."""
    return weight._quantize("cpu")


def measured(weight: Any, dense: Any, right: Any, left: Any) -> dict[str, Any]:
    """The merged weight, a product with it, and the gradient of half its square."""
    import torch

    a, b = (x.detach().clone().requires_grad_() for x in (right, left))
    x = torch.from_numpy(random_tensor("loftq.x", (ROWS, weight.shape[1])))
    y = x @ (dense + b @ a).T
    (y.square().sum() / 2).backward()
    shown = {
        "update": b @ a,
        "merged": dense + b @ a,
        "y": y,
        "b_da": b @ a.grad,
        "db_a": b.grad @ a,
    }
    rows = {n: v[:ROWS].detach().double().numpy() for n, v in shown.items()}
    left_over = float((weight - dense - b @ a).detach().norm())
    return {**{n: v.round(6).tolist() for n, v in rows.items()}, "left": left_over}


if __name__ == "__main__":
    main()
