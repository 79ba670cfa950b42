"""Shows what a run would do, before anything is read into memory or compiled.

    python -m ftjax.check --config=configs/sft.py:model=PATH --config.data.train=FILE

Takes what `ftjax.train` takes: the rows as the model will see them, with the trained
tokens marked; lengths; what is dropped and why; what is trained; the memory it takes.
"""

from typing import Any

from absl import flags

from ftjax import cli, describe
from ftjax.console import say, table
from ftjax.data.show import show_group
from ftjax.errors import UserError
from ftjax.memory import estimate
from ftjax.prepare import Prepared, prepare, trainable_rows
from ftjax.reference import reads_before


def main(args: flags.FlagValues) -> dict[str, Any]:
    if args.config is None:
        raise UserError(
            "no configuration is named", fix="--config=configs/sft.py:model=PATH"
        )
    ready = prepare(args.config)
    reads_before(args.config, ready)  # refuses what a stream cannot give
    data = ready.data.train
    count = min(args.rows, len(data.groups))
    for i in range(count):
        say(show_group(data, i * len(data.groups) // count, ready.base.tokenizer))
    say(describe.plan(args.config, ready))
    sizes = estimate(args.config, ready.shape, ready.data.length, ready.mesh)
    say("\nmemory per device, from shapes (activations are an upper estimate)")
    say(table([[name, f"{size / 1e6:,.1f} MB"] for name, size in sizes.items()]))
    return {**_account(ready), "memory": sizes}


def _account(ready: Prepared) -> dict[str, Any]:
    report = ready.data.train.report
    return {
        "read": report.read,
        "kept": report.kept,
        "dropped": {reason: tally.count for reason, tally in report.dropped.items()},
        "skipped": report.skipped_rows,
        "truncated": report.truncated,
        "identical": report.identical.count,
        "duplicates": report.duplicates,
        "tokens": report.tokens,
        "trained_tokens": report.trained,
        "lengths": report.quantiles(),
        "warnings": report.warnings,
        "steps": ready.steps,
        "trainable": trainable_rows(ready.shape)[-1][4],
    }


def define(args: flags.FlagValues) -> None:
    flags.DEFINE_integer("rows", 3, "examples to show", flag_values=args)
    flags.DEFINE_string("workdir", "", "taken, and not touched", flag_values=args)


if __name__ == "__main__":
    cli.entry(main, define, config=True)
