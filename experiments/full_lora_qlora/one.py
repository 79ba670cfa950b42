"""One run of the experiment, in a process of its own: its peak memory is its own.

python -m experiments.full_lora_qlora.one --method=LoRA --seed=0 --steps=100 --out=DIR
"""

from ftjax import runtime

if __name__ == "__main__":
    runtime.prepare()

import argparse
from pathlib import Path
from typing import Any

import jax

from benchmarks.turns import memory_mb
from experiments.full_lora_qlora.sweep import METHODS, config, settings
from ftjax import train
from ftjax.optim import make_optimizer
from ftjax.prepare import load_variables, prepare, trainable_rows
from ftjax.workdir import write_json_atomic

RESULT = "result.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    made = config(args.method, args.seed, args.steps)
    told = train.run(made, str(args.out))
    # The tree sizes come after: they load the base once more.
    peak = memory_mb("VmHWM")
    result = {
        "method": args.method,
        "seed": args.seed,
        "settings": settings(args.method, args.seed, args.steps),
        "loss_before": told["eval_before"]["loss"],
        "loss": told["eval"]["loss"],
        "eval_tokens": told["eval"]["tokens"],
        "tokens_per_s": told["tokens_per_s"],
        "peak_mb": peak,
        **tree_sizes(made),
    }
    write_json_atomic(args.out / RESULT, result)


def tree_sizes(config: Any) -> dict[str, Any]:
    """Trained numbers, and the bytes of each tree's buffers, as training makes them.

    Returns:
      trainable: numbers that the optimizer moves. bytes: of each collection, and of the
        optimizer's state.
    """
    ready = prepare(config)
    loaded = load_variables(config, ready.base, ready.shape, ready.mesh)
    trained, frozen, _ = loaded
    optimizer = make_optimizer(config.optim, ready.steps).init(trained)
    trees = {**frozen, **trained, "optimizer": optimizer}
    sizes = {
        name: sum(x.nbytes for x in jax.tree.leaves(tree))
        for name, tree in trees.items()
    }
    trainable = trainable_rows(ready.shape)[-1][4]
    return {"trainable": trainable, "bytes": sizes}


if __name__ == "__main__":
    main()
