"""Makes objective_steps.json: three AdamW steps of every objective, by torch and PEFT.

Run by hand, from the root of the repository, in an environment that has them:

    python -m tests.goldens.make_objective_steps

Model, optimizer and LoRA are those of `make_steps`, which has `sft`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.goldens import make_steps
from tests.goldens.torch_offline import (
    Loss,
    cpo,
    distill,
    dpo,
    kto,
    orpo,
    reward,
    simpo,
)
from tests.goldens.torch_online import grpo, ppo

OUT = Path(__file__).parent / "objective_steps.json"
TASKS = (dpo, orpo, cpo, simpo, reward, kto, grpo, ppo, distill)


def run(task: Callable[[Any], Loss], method: str) -> dict[str, Any]:
    model = make_steps.build(method)
    return make_steps.run(model, task(model))


def main() -> None:
    """Writes every task, by both methods."""
    import peft
    import torch
    import transformers

    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}"
    )
    methods = ("full", "lora")
    tasks = {
        task.__name__: {method: run(task, method) for method in methods}
        for task in TASKS
    }
    OUT.write_text(json.dumps({"made_with": versions, "tasks": tasks}, indent=1) + "\n")
    print(versions)
    for name, found in tasks.items():
        print(name, *(found[method]["loss"] for method in methods))


if __name__ == "__main__":
    main()
