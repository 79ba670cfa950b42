"""The runs of the experiment: which methods, which seeds, with what settings."""

from typing import Any

from configs import sft
from ftjax.demo import VALUES as DEMO

# The argument after the colon of configs/sft.py, and what differs from the demo. The
# rate of full fine-tuning is the best of 1e-4, 3e-4 and 1e-3, with seed 9.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("method=full", {"optim.lr": 3e-4}),
    "LoRA": ("method=lora", {}),
    "QLoRA int8": ("method=qlora", {"quant.format": "int8"}),
    "QLoRA int4": ("method=qlora", {"quant.format": "int4"}),
    "QLoRA nf4": ("method=qlora", {"quant.format": "nf4"}),
    "QLoRA nf4, double": (
        "method=qlora",
        {"quant.format": "nf4", "quant.double_quant": True},
    ),
}
SEEDS = (0, 1, 2)
STEPS = 100


def settings(method: str, seed: int, steps: int) -> dict[str, Any]:
    """What a run sets beside configs/sft.py and its method."""
    own = METHODS[method][1]
    values = {k: v for k, v in DEMO.items() if not k.startswith("method.")}
    if method != "full":
        values |= {k: v for k, v in DEMO.items() if k.startswith("method.")}
        values["quant.double_quant"] = False
    # Nothing but training and its two evaluations is to show in memory and time.
    rarely = {"eval_every": 0, "save_every": steps, "sample_rows": 0, "steps": steps}
    values |= {f"train.{key}": value for key, value in rarely.items()}
    return {**values, "seed": seed, **own}


def config(method: str, seed: int, steps: int) -> Any:
    """The config of one run."""
    made = sft.get_config(METHODS[method][0])
    made.update_from_flattened_dict(settings(method, seed, steps))
    return made
