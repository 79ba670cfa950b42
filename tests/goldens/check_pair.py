"""Codes with their adapter (export --to=pair) against transformers, bitsandbytes, peft.

Run by hand, from the root of the repository; the tests need none of them:

    python -m tests.goldens.check_pair ours DIR      # jax: exports runs, and our logits
    python -m tests.goldens.check_pair theirs DIR    # torch: loads them, and compares
"""

from pathlib import Path
from typing import Any

import numpy as np

from tests.goldens.check_quant import dense, load, logits
from tests.goldens.commands import run

BLOCK = 64  # bitsandbytes' CPU code wants whole blocks in a row
TOLERANCE = 2e-5
CASES: dict[str, dict[str, Any]] = {
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora", "use_rslora": True, "alpha": 4.0},
    "loftq": {"init": "loftq", "loftq_iters": 3},
    "plain": {},
}


def ours(folder: Path) -> None:
    from ftjax import cli, export
    from tests.goldens.check_quant import our_policy_logits
    from tests.runs import make_run
    from tests.tiny import make_tiny_checkpoint

    model = make_tiny_checkpoint(
        folder / "model", intermediate_size=2 * BLOCK, num_hidden_layers=3
    )
    for name, values in CASES.items():
        made = make_run(folder / f"run-{name}", model, method="qlora", rank=4, **values)
        argv = [f"--workdir={made}", "--to=pair", f"--out={folder / name}"]
        assert cli.run(export.main, argv, export.define) == 0
        np.save(folder / f"{name}.npy", our_policy_logits(workdir=str(made)))


def theirs(folder: Path) -> None:
    import peft

    worst = 0.0
    for name in CASES:
        wanted = np.load(folder / f"{name}.npy")
        base = dense(load(folder / name))
        moved = float(np.abs(logits(base) - wanted).max())
        model = peft.PeftModel.from_pretrained(base, folder / name / "adapter").eval()
        apart = float(np.abs(logits(model) - wanted).max())
        print(
            f"{name}: max |logit difference| {apart:.1e}; the adapter moves them by"
            f" {moved:.2f}"
        )
        assert moved > 0.1
        worst = max(worst, apart)
    print(f"worst {worst:.1e}; peft {peft.__version__}")
    assert worst < TOLERANCE


if __name__ == "__main__":
    run(ours, theirs)
