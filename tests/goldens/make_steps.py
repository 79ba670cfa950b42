"""Makes steps.json: three AdamW steps of a tiny model, by torch, transformers and PEFT.

Run by hand, from the root of the repository, in an environment that has them:

    python -m tests.goldens.make_steps

The loss of a step is the sum over its trained tokens, divided once; rows have prompts
of different lengths; the norm is clipped; decay is decoupled and spares the norms.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.goldens.weights import random_tensor, write_random

OUT = Path(__file__).parent / "steps.json"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPTIM = {"lr": 0.01, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0
LORA = {"rank": 4, "alpha": 10.0}
STEPS = 3


def rows() -> list[tuple[list[int], int]]:
    """(ids, length of the prompt) of each row, of unequal lengths."""
    lengths = ((20, 5), (11, 8), (16, 1), (7, 2))
    return [
        ([(5 * i * i + 7 * i + 3 * r + 1) % 64 for i in range(n)], prompt)
        for r, (n, prompt) in enumerate(lengths)
    ]


def summary(tensors: dict[str, Any]) -> dict[str, list[float]]:
    """Of each tensor: its sum, the sum of its squares, and its first number."""
    found = {}
    for name, tensor in sorted(tensors.items()):
        x = tensor.detach().double()
        found[name] = [x.sum().item(), (x * x).sum().item(), x.flatten()[0].item()]
    return found


def build(method: str, of: str = "") -> Any:
    """The model, on its random weights or others (`of`), with what `method` trains."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
        write_random(folder / "model.safetensors", shapes, of)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return with_lora(model) if method == "lora" else model


def run(model: Any, loss_of: Callable[[Any], Any]) -> dict[str, Any]:
    """Losses, gradient norms and the trained tensors after the last step."""
    import torch

    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p], "weight_decay": OPTIM["weight_decay"] * (p.ndim > 1)}
        for p in trained.values()
    ]
    betas = (OPTIM["b1"], OPTIM["b2"])
    optimizer = torch.optim.AdamW(groups, lr=OPTIM["lr"], betas=betas, eps=OPTIM["eps"])
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return {"loss": losses, "grad_norm": norms, "trained": summary(trained)}


def with_lora(model: Any) -> Any:
    """PEFT's LoRA on all projections, with a known `A`; `B` is zero, as PEFT has it."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=LORA["rank"],
        lora_alpha=LORA["alpha"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                value = random_tensor(name, tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(value))
    return model


def step_loss(model: Any) -> Any:
    """Sum over trained tokens of all rows / their number."""
    import torch

    total, count = 0.0, 0
    for ids, prompt in rows():
        logits = model(torch.tensor([ids])).logits[0, prompt - 1 : -1]
        targets = torch.tensor(ids[prompt:])
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        count += len(targets)
    return total / count


def main() -> None:
    """Writes both methods to steps.json."""
    import peft
    import torch
    import transformers

    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}"
    )
    methods = {method: run(build(method), step_loss) for method in ("full", "lora")}
    golden = {
        "made_with": versions,
        "config": CONFIG,
        "methods": methods,
    }
    OUT.write_text(json.dumps(golden, indent=1) + "\n")
    print(versions, methods["full"]["loss"], methods["lora"]["loss"])


if __name__ == "__main__":
    main()
