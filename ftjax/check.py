"""Shows what a run would do, before anything is read into memory or compiled.

    python -m ftjax.check --config=configs/sft.py:model=PATH --config.data.train=FILE

Takes what `ftjax.train` takes: the rows as the model will see them, with the trained
tokens marked; lengths; what is dropped and why; what is trained; the memory it takes.
"""

from typing import Any

from absl import flags

from ftjax import cli
from ftjax.config import check_devices, total_steps, validate
from ftjax.console import say, table
from ftjax.errors import UserError


def main(args: flags.FlagValues) -> dict[str, Any]:
    if args.config is None:
        raise UserError(
            "no configuration is named", fix="--config=configs/sft.py:model=PATH"
        )
    config = args.config
    validate(config)
    # These start JAX: a mistyped value is found before.
    from ftjax import describe
    from ftjax.data.show import show_example
    from ftjax.loading import open_base
    from ftjax.memory import estimate
    from ftjax.prepare import prepare_data, prepare_shape, trainable_rows
    from ftjax.sharding import make_mesh

    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_devices(config, mesh.size)
    scratch = config.model.from_scratch
    base = open_base(
        config.model.path,
        config.model.revision,
        config.data.chat_template,
        weights=not scratch,
    )
    shape = prepare_shape(config, base, mesh)
    data = prepare_data(config, base)
    steps = total_steps(config, data.loader.rows_per_epoch)
    examples = data.train.examples
    count = min(args.rows, len(examples))
    for i in range(count):
        say(show_example(examples[i * len(examples) // count], base.tokenizer) + "\n")
    say(describe.plan(config, base, shape, data, steps))
    sizes = estimate(config, shape, data.length, mesh)
    say("\nmemory per device, from shapes (activations are an upper estimate)")
    say(table([[name, f"{size / 1e6:,.1f} MB"] for name, size in sizes.items()]))
    report = data.train.report
    return {
        "read": report.read,
        "kept": report.kept,
        "dropped": {reason: tally.count for reason, tally in report.dropped.items()},
        "skipped": report.skipped_rows,
        "identical": report.identical.count,
        "truncated": report.truncated,
        "tokens": report.tokens,
        "trained_tokens": report.trained,
        "lengths": report.quantiles(),
        "warnings": report.warnings,
        "steps": steps,
        "trainable": trainable_rows(shape)[-1][4],
        "memory": sizes,
    }


def define(args: flags.FlagValues) -> None:
    flags.DEFINE_integer("rows", 3, "examples to show", flag_values=args)
    flags.DEFINE_string("workdir", "", "taken, and not touched", flag_values=args)


if __name__ == "__main__":
    cli.entry(main, define, config=True)
