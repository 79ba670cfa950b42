"""Speed and memory of a training step and of generation, beside peers.

    python -m benchmarks.train_step [--shapes=S,M,L]
        [--methods=full,lora,qlora,generate] [--impl=ftjax,transformers,tunix]
        [--steps=5] [--python-torch=PATH] [--python-tunix=PATH]

Prints one JSON line per row, then the ratios. Each row has a process of its own, so
that memory and compile time are its own; the processes of one task take turns, step by
step, so that a machine that slows down slows them all.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.rows import Row, cores
from benchmarks.turns import Request
from ftjax import cli
from ftjax.console import say, table
from ftjax.errors import UserError

TASKS = {
    "full": "sft full",
    "lora": "sft lora r16",
    "qlora": "sft qlora r16",
    "generate": "generate 8x128",
}
MODULES = {
    "ftjax": "benchmarks.ours",
    "transformers": "benchmarks.peers.torch_peer",
    "tunix": "benchmarks.peers.tunix_peer",
}
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 8, 32, 128


def main(args: flags.FlagValues) -> dict[str, Any]:
    from benchmarks.shapes import SHAPES, write_checkpoint

    shapes = chosen(args, "shapes", list(SHAPES))
    tasks = chosen(args, "methods", list(TASKS))
    names = chosen(args, "impl", list(MODULES))
    if args.steps < 1:
        raise UserError("there is nothing to measure", where="--steps", expected=">= 1")
    pythons = interpreters(args)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ftjax-benchmark-") as folder:
        for name in shapes:
            shape = SHAPES[name]
            write_checkpoint(Path(folder) / name, shape)
            for task in tasks:
                request = make_request(Path(folder) / name, shape, task)
                group = [Row(n, MODULES[n], pythons[n], request) for n in names]
                for found in measure(group, args.steps):
                    rows.append({"shape": name, "task": TASKS[task]} | found)
                    line = json.dumps(rows[-1])
                    print(line, file=sys.__stdout__, flush=True)
    ratios = compare(rows)
    if ratios:
        say(_ratio_table(ratios))
    return {"ratios": ratios}


def interpreters(args: flags.FlagValues) -> dict[str, str]:
    """The Python of each implementation."""
    return {
        "ftjax": sys.executable,
        "transformers": args["python-torch"].value or sys.executable,
        "tunix": args["python-tunix"].value or sys.executable,
    }


def measure(group: list[Row], steps: int) -> list[dict[str, Any]]:
    """Rows beside each other: all are started, then they take turns."""
    try:
        for row in group:
            row.start()
            row.turn()  # the first step, while nobody else works
        for index in range(steps):
            # Whoever comes first finds the caches as another left them.
            first = index % len(group)
            for row in group[first:] + group[:first]:
                row.turn()
    finally:
        for row in group:
            row.close()
    return [_row(row) for row in group]


def _row(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {"implementation": row.name, **row.versions}
    if row.fault:
        return found | {"skipped": row.fault}
    first, *rest = row.turns
    seconds = [turn["seconds"] for turn in rest]
    cpu = [turn["cpu_seconds"] for turn in rest]
    generates = row.request.task == "generate"
    tokens = row.request.rows * (
        row.request.new_tokens if generates else row.request.length
    )
    found |= {
        "tokens_per_s": round(tokens / statistics.median(seconds), 1),
        "step_s": round(statistics.median(seconds), 4),
        "step_s_min": round(min(seconds), 4),
        "step_s_max": round(max(seconds), 4),
        "cpu_s_per_step": round(statistics.median(cpu), 4),
        "first_step_s": round(first["seconds"], 2),
        "peak_mb": round(rest[-1]["peak_mb"]),
        "imports_mb": round(first["baseline_mb"]),
        "steps": len(rest),
    }
    key = "first_tokens" if generates else "first_loss"
    return found | {key: first["value"][:8] if generates else first["value"]}


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """ftjax over each peer: above 1 is faster; below 1 is less memory, less work."""
    found = []
    ours = {
        (row["shape"], row["task"]): row
        for row in rows
        if row["implementation"] == "ftjax" and "skipped" not in row
    }
    for row in rows:
        own = ours.get((row["shape"], row["task"]))
        if own is None or row is own or "skipped" in row:
            continue
        ratio = {"shape": row["shape"], "task": row["task"]}
        ratio["peer"] = row["implementation"]
        for key in ("tokens_per_s", "peak_mb", "cpu_s_per_step", "first_step_s"):
            ratio[key] = round(own[key] / row[key], 3) if row[key] else None
        found.append(ratio)
    return found


def _ratio_table(ratios: list[dict[str, Any]]) -> str:
    headers = ["shape", "task", "ftjax /", "tokens/s", "memory", "cpu", "first step"]
    return table([list(ratio.values()) for ratio in ratios], headers)


def make_request(folder: Path, shape: Any, task: str) -> Request:
    """What a row of this task is to run, of the checkpoint in `folder`."""
    generates = task == "generate"
    return Request(
        task=task,
        checkpoint=str(folder),
        vocab_size=shape.config["vocab_size"],
        rows=PROMPTS if generates else shape.rows,
        length=PROMPT_LENGTH if generates else shape.length,
        new_tokens=NEW_TOKENS if generates else 0,
        learning_rate=1e-4,
        rank=16,
        alpha=32,
        threads=cores(),
    )


def chosen(args: flags.FlagValues, flag: str, known: list[str]) -> list[str]:
    """The names in a list flag.

    Raises:
      UserError: for none, or one that is not `known`.
    """
    named = [str(name) for name in args[flag].value or ()]
    wrong = [name for name in named if name not in known]
    if wrong or not named:
        raise UserError(
            f"--{flag} names what is not measured",
            where=f"--{flag}",
            expected=", ".join(known),
            got=", ".join(wrong) or "nothing",
        )
    return named


def define(args: flags.FlagValues) -> None:
    for flag, values, text in (
        ("shapes", ["S", "M", "L"], "models"),
        ("methods", list(TASKS), "tasks"),
        ("impl", list(MODULES), "implementations; what is not installed says so"),
    ):
        flags.DEFINE_list(flag, values, text, flag_values=args)
    define_peers(args)


def define_peers(args: flags.FlagValues) -> None:
    """How long to measure, and where the peers are installed."""
    flags.DEFINE_integer("steps", 5, "measured steps per row", flag_values=args)
    for peer, what in (("torch", "torch, transformers, peft"), ("tunix", "tunix")):
        text = f"a Python that has {what}; empty: this one"
        flags.DEFINE_string(f"python-{peer}", "", text, flag_values=args)


if __name__ == "__main__":
    cli.entry(main, define)
