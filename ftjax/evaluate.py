"""Evaluates a model, a run or an adapter on a file: loss, perplexity, accuracy.

    python -m ftjax.evaluate --model=DIR --data=FILE [--json]
    python -m ftjax.evaluate --model=DIR --adapter=none,A,B --use=0,2 --data=FILE

In float32. The loss is per trained token: of plain text every token after the first, of
prompts and conversations the answers (--nocompletion_only: everything). Several
adapters are added up; with --use each is measured alone, over one base in memory.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from ftjax import cli
from ftjax.adapters import NONE, names_of
from ftjax.console import say
from ftjax.data.dataset import Dataset, build_dataset
from ftjax.data.loader import Loader, row_length
from ftjax.data.report import DataReport
from ftjax.errors import UserError
from ftjax.evals.causal import evaluate, make_sum_batch
from ftjax.loading import Base, Policy, open_policy
from ftjax.sharding import batch_sharding, make_mesh
from ftjax.switch import chosen_alone, parse_use

CHUNK = 64  # positions per row that the head handles at a time
LONGEST = 2048  # tokens per row where neither the model nor the user sets less


def define(args: flags.FlagValues) -> None:
    cli.define_source(args)
    integer, text = flags.DEFINE_integer, flags.DEFINE_string
    text(
        "use", "", "which of the adapters are measured, in turn: 0,1", flag_values=args
    )
    text("data", "", "a file, pydoc:..., a name", flag_values=args)
    text("split", "test", "of a `datasets` name", flag_values=args)
    integer("max_length", 0, "tokens per row; 0: all", lower_bound=0, flag_values=args)
    integer("batch_size", 8, "rows at a time", lower_bound=1, flag_values=args)
    flags.DEFINE_bool("completion_only", True, "not the prompts", flag_values=args)
    flags.DEFINE_enum(
        "overlong",
        "truncate",
        ["truncate", "drop", "error"],
        "what becomes of rows longer than max_length",
        flag_values=args,
    )


def main(args: flags.FlagValues) -> dict[str, Any]:
    if not args.data:
        raise UserError("there is nothing to evaluate on", fix="--data=FILE")
    mesh, names = make_mesh(), names_of(args.adapter)
    summed = bool(args.adapter_weights or args.adapter_rank)
    uses = parse_use(args.use, names, summed=summed) if args.use else []
    policy = open_policy(
        model=args.model,
        workdir=args.workdir,
        adapter=NONE if uses else args.adapter,
        adapter_weights=args.adapter_weights,
        adapter_rank=args.adapter_rank,
        dtype=jnp.float32,
        mesh=mesh,
        weights=args.weights,
    )
    if not uses:
        return _told(args, policy, mesh)
    results: list[dict[str, Any]] = []
    for i in uses:
        own = chosen_alone(policy, names[i], mesh=mesh)
        told = _told(args, own, mesh, tell=not results)
        results.append({**told, "adapter": names[i]})
    return results[0] if len(results) == 1 else {**results[0], "results": results}


def _told(
    args: flags.FlagValues, policy: Policy, mesh: Mesh, *, tell: bool = True
) -> dict[str, Any]:
    """What was measured of one policy, which is said too."""
    found, report = measure(args, policy, mesh, tell=tell)
    say(
        f"\n{policy.label}\nloss {found['loss']:.5f}, perplexity"
        f" {found['perplexity']:.3f}, {found['token_accuracy']:.2%} of"
        f" {found['tokens']:,} tokens right"
    )
    counts = {"rows": report.kept, "truncated": report.truncated}
    return {**found, **counts, "dropped": report.dropped_rows, "model": policy.label}


def measure(
    args: Any, policy: Policy, mesh: Mesh, *, tell: bool = True
) -> tuple[dict[str, float], DataReport]:
    """Loss, perplexity, accuracy and tokens of a policy, and what the data was.

    Args:
      args: `data`, `split`, `max_length`, `batch_size`, `completion_only`, `overlong`
        (and `rows`: at most so many, spread evenly),
        as this command has them.
      tell: prints the report of the data.
    """
    batches, report = read_batches(args, policy.base, mesh, policy.max_positions)
    if tell:
        say(report.text())
    found = evaluate(
        make_sum_batch(policy.model, CHUNK),
        policy.variables,
        batches,
        batch_sharding(mesh),
    )
    return found, report


def read_batches(
    args: Any, base: Base, mesh: Mesh, most: int = 0
) -> tuple[Iterator[dict[str, np.ndarray]], DataReport]:
    """The batches of a data set, in file order, and what the data was.

    Args:
      args: as in `measure`.
      most: tokens that fit into the model's context; 0: all of its positions.
    """
    longest = _max_length(args, most or base.spec.max_positions)
    dataset = _dataset(args, base, longest)
    length = row_length(dataset, max_length=longest, packing=False)
    loader = Loader(dataset, length=length, packing=True, seed=0, shuffle=False)
    rows = -(-min(args.batch_size, loader.rows_per_epoch) // mesh.size) * mesh.size
    return loader.epoch(rows), dataset.report


def _dataset(args: Any, base: Base, longest: int) -> Dataset:
    rules = SimpleNamespace(
        max_length=longest,
        overlong=args.overlong,
        completion_only=args.completion_only,
        empty_completion="drop",
        on_bad_row="error",
        split=args.split,
        eval_rows=getattr(args, "rows", 0),
    )
    return build_dataset(
        args.data,
        base.tokenizer,
        rules,
        vocab_size=base.spec.vocab_size,
        split="eval",
    )


def _max_length(args: Any, most: int) -> int:
    """How many tokens of a row are looked at."""
    if args.max_length > most:
        raise UserError(
            "rows would be longer than the model's context",
            where="--max_length",
            expected=f"at most {most}",
            got=str(args.max_length),
        )
    return args.max_length or min(most, LONGEST)


if __name__ == "__main__":
    cli.entry(main, define)
