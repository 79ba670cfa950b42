"""Rollouts whose lanes take the next prompt when a row is done, beside whole batches.

    python -m benchmarks.rollouts [--prompts=256] [--lanes=32] [--new=256] [--mean=64]
        [--turns=3]

The shape S (see `benchmarks.shapes`) with random weights, at temperature 1, and so many
tokens that end a text that an answer has `--mean` tokens where nothing cuts it. A batch
takes as long as its longest answer. Both ways run in one process and take turns; the
first turn, which compiles, is not counted. Prints new tokens per second of each, and
their ratio.
"""

import json
import statistics
import sys
import time
from typing import Any

import numpy as np
from absl import flags

from ftjax import cli, runtime
from ftjax.console import say

PROMPT = (8, 64)  # tokens, from and to


def main(args: flags.FlagValues) -> dict[str, Any]:
    from ftjax.decoding.sampling import Sampling

    generator, vocabulary = _generator(args.mean)
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(0, vocabulary, rng.integers(*PROMPT)).tolist()
        for _ in range(args.prompts)
    ]
    ways = {"filled": len(prompts), "batches": args.lanes}  # prompts of one call
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.turns + 1):
        for name, size in ways.items():
            begun, tokens = time.perf_counter(), 0
            for start in range(0, len(prompts), size):
                made = generator.generate(
                    prompts[start : start + size],
                    args.new,
                    Sampling(temperature=1.0, seed=turn * len(prompts) + start),
                    max_num_seqs=args.lanes,
                )
                tokens += sum(len(one.tokens) for one in made)
            if turn:
                rates[name].append(tokens / (time.perf_counter() - begun))
    found = {name: round(statistics.median(each)) for name, each in rates.items()}
    for name, rate in found.items():
        row = {"way": name, "tokens_per_s": rate}
        print(json.dumps(row), file=sys.__stdout__, flush=True)
    ratio = round(found["filled"] / found["batches"], 3)
    say(f"filled / batches: {ratio} of the tokens per second")
    return {"tokens_per_s": found, "ratio": ratio}


def _generator(mean: int) -> tuple[Any, int]:
    """Of random weights, which ends a text after `mean` tokens; and its vocabulary."""
    from benchmarks.shapes import SHAPES
    from ftjax.decoding.generator import Generator
    from ftjax.models.decoder import Decoder
    from ftjax.models.registry import spec_from_config
    from ftjax.prepare import random_params
    from ftjax.sharding import make_mesh

    spec = spec_from_config(SHAPES["S"].config, "the shape S")
    params = random_params(Decoder(spec), 0, make_mesh())
    ends = range(spec.vocab_size // mean)
    return Generator(spec, {"params": params}, eos_ids=ends), spec.vocab_size


def define(args: flags.FlagValues) -> None:
    for name, usual, what in (
        ("prompts", 256, "answered"),
        ("lanes", 32, "rows side by side"),
        ("new", 256, "tokens of an answer, at most"),
        ("mean", 64, "tokens of an answer"),
        ("turns", 3, "measured"),
    ):
        flags.DEFINE_integer(name, usual, what, lower_bound=1, flag_values=args)


if __name__ == "__main__":
    runtime.prepare()
    cli.entry(main, define)
