"""A DPO step beside an SFT step on as many tokens: memory and time.

    python -m benchmarks.preference [--shapes=M] [--methods=lora,full] [--steps=3]

Prints one JSON line per row, then the ratios. A row of the batch is one text for SFT
and one pair, half as long each, for DPO; every token after the first of a text is
trained on. With LoRA the reference is the base, in the same step; with every weight
trained it is two numbers of each pair, computed before. Processes and clocks are those
of `benchmarks.train_step`.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.rows import Row
from benchmarks.train_step import chosen, make_request, measure
from ftjax import cli
from ftjax.console import say, table
from ftjax.errors import UserError

METHODS = ("lora", "full", "qlora")
MOST = 1.3  # memory of DPO over that of SFT that is not to be passed


def main(args: flags.FlagValues) -> dict[str, Any]:
    from benchmarks.shapes import SHAPES, write_checkpoint

    shapes = chosen(args, "shapes", list(SHAPES))
    methods = chosen(args, "methods", list(METHODS))
    if args.steps < 1:
        raise UserError("there is nothing to measure", where="--steps", expected=">= 1")
    ratios: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ftjax-benchmark-") as folder:
        for name in shapes:
            path = Path(folder) / name
            write_checkpoint(path, SHAPES[name])
            for method in methods:
                found = _rows(path, SHAPES[name], method, args.steps)
                for row in found:
                    line = json.dumps({"shape": name, **row})
                    print(line, file=sys.__stdout__, flush=True)
                ratios.append({"shape": name, "method": method, **_ratio(*found)})
    headers = ["shape", "method", "memory", "step", "cpu", f"memory <= {MOST}"]
    say(table([list(ratio.values()) for ratio in ratios], headers))
    return {"ratios": ratios}


def _rows(path: Path, shape: Any, method: str, steps: int) -> list[dict[str, Any]]:
    """SFT's row and DPO's, which take turns."""
    group = [
        Row(task, "benchmarks.ours", sys.executable, make_request(path, shape, task))
        for task in (method, f"dpo {method}")
    ]
    return measure(group, steps)


def _ratio(sft: dict[str, Any], dpo: dict[str, Any]) -> dict[str, Any]:
    """DPO over SFT."""
    for row in (sft, dpo):
        if "skipped" in row:
            raise UserError("a row could not be measured", got=row["skipped"])
    keys = ("peak_mb", "step_s", "cpu_s_per_step")
    found = {key: round(dpo[key] / sft[key], 3) for key in keys}
    return {**found, "within": found["peak_mb"] <= MOST}


def define(args: flags.FlagValues) -> None:
    flags.DEFINE_list("shapes", ["M"], "models", flag_values=args)
    flags.DEFINE_list("methods", ["lora", "full"], "methods", flag_values=args)
    flags.DEFINE_integer("steps", 3, "measured steps per row", flag_values=args)


if __name__ == "__main__":
    cli.entry(main, define)
