"""Pairs whose prompt stands once, beside pairs that repeat it: tokens and time.

    python -m benchmarks.shared_prompt [--prompt=512] [--answer=32] [--pairs=2]
        [--steps=5]

A DPO step with LoRA at the shape S (see `benchmarks.shapes`), random weights and
tokens, both layouts in one process, which take turns. Prints the tokens of a pair in
each, their ratio, and that of the median steps; the losses of both must agree.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from ftjax import cli, runtime
from ftjax.console import say
from ftjax.data.dataset import Dataset
from ftjax.data.encode import Example
from ftjax.data.groups import VALUES
from ftjax.data.loader import Loader, group_slots, row_length
from ftjax.data.report import DataReport

VOCABULARY = 4096
LAYOUTS = {"repeated": False, "shared": True}


def main(args: flags.FlagValues) -> dict[str, Any]:
    data = {name: _pairs(args, shared) for name, shared in LAYOUTS.items()}
    steps = {name: _step(found, args.pairs) for name, found in data.items()}
    times: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    losses: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for index in range(args.steps + 1):
        for name, step in steps.items():
            begun = time.perf_counter()
            losses[name].append(step(index))
            if index:  # the first one compiles
                times[name].append(time.perf_counter() - begun)
    rows: dict[str, dict[str, Any]] = {
        name: {
            "layout": name,
            "tokens_per_pair": float(group_slots(found).mean()),
            "step_s": round(statistics.median(times[name]), 4),
            "last_loss": losses[name][-1],
        }
        for name, found in data.items()
    }
    for row in rows.values():
        print(json.dumps(row), file=sys.__stdout__, flush=True)
    np.testing.assert_allclose(losses["shared"], losses["repeated"], rtol=1e-4)
    ratios = {
        key: round(rows["shared"][key] / rows["repeated"][key], 3)
        for key in ("tokens_per_pair", "step_s")
    }
    say(f"shared / repeated: tokens {ratios['tokens_per_pair']}, "
        f"step {ratios['step_s']}")  # fmt: skip
    return ratios


def _pairs(args: Any, shared: bool) -> Dataset:
    """Pairs of one length, as many as all steps read."""
    rng = np.random.default_rng(0)
    count, length = args.pairs * (args.steps + 1), args.prompt + args.answer
    examples = []
    for number in range(count):
        prompt = rng.integers(0, VOCABULARY, args.prompt)
        for _ in range(2):
            answer = rng.integers(0, VOCABULARY, args.answer)
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            trained = np.arange(length) >= args.prompt
            examples.append(Example(ids, trained, f"pair {number}"))
    report = DataReport("random pairs", "train", length)
    return Dataset(
        examples,
        report,
        groups=[(2 * i, 2 * i + 1) for i in range(count)],
        values={name: np.ones(count, np.float32) for name in VALUES["pairs"]},
        members=2,
        shared=shared,
    )


def _step(data: Dataset, rows: int) -> Callable[[int], float]:
    """step(i): the loss of the i-th optimizer step, one pair a row."""
    import jax

    from benchmarks.shapes import SHAPES
    from configs import dpo as config_of
    from ftjax.loop import compile_step, on_mesh
    from ftjax.methods.method import plan_method
    from ftjax.models.decoder import Decoder
    from ftjax.models.registry import spec_from_config
    from ftjax.objectives.dpo import dpo
    from ftjax.optim import make_optimizer
    from ftjax.prepare import random_params
    from ftjax.sharding import batch_sharding, make_mesh, put_batch
    from ftjax.step import init_state

    config, mesh = config_of.get_config("method=lora"), make_mesh()
    config.optim.warmup = 0
    model = Decoder(spec_from_config(SHAPES["S"].config, "the shape S"), mesh=mesh)
    base = {"params": random_params(model, 0, mesh)}
    trained, frozen = plan_method(model, config.method).start(base, 0)
    tx = make_optimizer(config.optim, steps=1000)
    state = on_mesh(init_state(trained, tx, 0), mesh)
    step_fn = compile_step(dpo(model, config.loss), tx, state)
    length = row_length(data, max_length=1, packing=False)
    loader = Loader(data, length=length, packing=False, seed=0, shuffle=False)
    sharding = batch_sharding(mesh, leading=1)

    def step(index: int) -> float:
        nonlocal state
        batch = {k: x[None] for k, x in loader.batch(index * rows, rows).items()}
        state, metrics = step_fn(state, frozen, put_batch(batch, sharding))
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def define(args: flags.FlagValues) -> None:
    for name, usual, what in (
        ("prompt", 512, "tokens of a prompt"),
        ("answer", 32, "tokens of an answer"),
        ("pairs", 2, "of a step"),
        ("steps", 5, "measured"),
    ):
        flags.DEFINE_integer(name, usual, what, lower_bound=1, flag_values=args)


if __name__ == "__main__":
    runtime.prepare()
    cli.entry(main, define)
