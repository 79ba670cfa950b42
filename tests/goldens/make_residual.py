"""Makes residual.json: PEFT's PiSSA and OLoRA, their start, a gradient and a step.

Run by hand, from the root of the repository, in an environment with torch,
transformers and peft:

    python -m tests.goldens.make_residual

Signs of singular vectors are free, and with them those of the factors; what is kept
does not depend on them: b.da and db.a, the residual, logits.
"""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.goldens.check_peft import IDS, torch_logits, transformers_model, write_base

OUT = Path(__file__).parent / "residual.json"
CASES: dict[str, dict[str, Any]] = {
    "pissa": {"r": 4, "lora_alpha": 10},
    "pissa_rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "olora": {"r": 3, "lora_alpha": 12},
}
TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]
SHOWN = ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj")
ROWS, RATE = 2, 0.02  # of what is kept; of the step


def main() -> None:
    import peft
    import torch
    import transformers

    cases = {}
    with tempfile.TemporaryDirectory() as temp:
        base = write_base(Path(temp) / "base")
        for name, settings in CASES.items():
            cases[name] = run(base, Path(temp) / name, name.split("_")[0], settings)
    made = f"torch {torch.__version__}, transformers {transformers.__version__}"
    text = {"made_with": f"{made}, peft {peft.__version__}", "cases": cases}
    OUT.write_text(json.dumps(text, separators=(",", ":")) + "\n")
    print(f"wrote {OUT}: {OUT.stat().st_size} bytes; {text['made_with']}")


def run(base: Path, folder: Path, start: str, settings: dict[str, Any]) -> Any:
    """One start, one step of gradient descent, and the adapter that PEFT converts."""
    import peft
    import torch

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=TARGETS,
        init_lora_weights=start,
        **settings,
    )
    model = peft.get_peft_model(transformers_model(base), copy.deepcopy(config))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "start")
    model.peft_config["default"].init_lora_weights = start
    start_logits = torch_logits(model)
    found: dict[str, Any] = {"settings": settings, "start": rounded(start_logits)}
    ids = torch.tensor([IDS])
    logits = model(ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    loss.backward()
    found["loss"] = loss.item()
    modules = dict(model.base_model.model.named_modules())
    for name in SHOWN:
        layer = modules[name]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        found[name] = {
            "residual": rounded(layer.base_layer.weight.detach().numpy()),
            "b_da": rounded((b @ a.grad).detach().numpy()),
            "db_a": rounded((b.grad @ a).detach().numpy()),
        }
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= RATE * weight.grad
    stepped = torch_logits(model)
    found["stepped"] = rounded(stepped[-ROWS:])
    model.save_pretrained(
        folder / "plain", path_initial_model_for_weight_conversion=folder / "start"
    )
    plain = peft.PeftModel.from_pretrained(transformers_model(base), folder / "plain")
    apart = np.abs(torch_logits(plain) - stepped).max()
    moved = np.abs(stepped - start_logits).max()
    print(f"{folder.name}: moved by {moved:.3f}, converted differs by {apart:.1e}")
    assert apart < 1e-4 < moved
    return found


def rounded(values: np.ndarray) -> list[Any]:
    return values[:ROWS].astype(np.float64).round(6).tolist()


if __name__ == "__main__":
    main()
