"""What quantization costs and gives, in numbers, and QLoRA beside LoRA and peers.

    python -m benchmarks.quant [--parts=error,perplexity,speed,step] [--shapes=S,L]
        [--impl=ftjax,transformers,tunix] [--steps=5]
        [--python-torch=PATH] [--python-tunix=PATH]

Prints one JSON line per row, then the tables.
"""

from ftjax import runtime

if __name__ == "__main__":
    runtime.prepare()

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.rows import Row
from benchmarks.train_step import (
    MODULES,
    TASKS,
    chosen,
    define_peers,
    interpreters,
    make_request,
    measure,
)
from ftjax import cli
from ftjax.console import say, table
from ftjax.errors import UserError

PARTS = ("error", "perplexity", "speed", "step")
SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
STORIES = (SHARED / "models/stories260K", SHARED / "data/text/tinystories_eval.txt")
CORPORA = {
    "stories260K": (str(STORIES[0]), str(STORIES[1])),
    "base": ("base", "pydoc:text[eval]"),
}

Line = dict[str, Any]


def main(args: flags.FlagValues) -> dict[str, Any]:
    parts = chosen(args, "parts", list(PARTS))
    for flag in ("steps", "size", "repeats"):
        if getattr(args, flag) < 1:
            raise UserError("nothing to measure", where=f"--{flag}", expected=">= 1")
    found: list[Line] = []
    if "error" in parts or "speed" in parts:
        found += weights(args.size, args.repeats if "speed" in parts else 0)
    if "perplexity" in parts:
        found += perplexity(args.rows)
    if found:
        say("\n" + format_table(found))
    steps: list[Line] = []
    if "step" in parts:
        steps = training(args)
        say("\n" + step_table(steps))
    return {"formats": found, "steps": steps}


def weights(size: int, repeats: int) -> list[Line]:
    """Bits, error and speed of each format on a Gaussian weight [size, size]."""
    from benchmarks import formats

    weight, found = formats.gaussian(size, size), []
    for name in ("none", *formats.FORMATS):
        line: Line = {"format": name, "weight": [size, size]}
        if name != "none":
            line |= _rounded(formats.error(weight, name))
        if repeats:
            line |= _rounded(formats.speed(weight, name, repeats))
        found.append(_printed(line))
    return found


def perplexity(rows: int) -> list[Line]:
    """Of each corpus and format; a line that says why, where there is no number."""
    from benchmarks.formats import FORMATS, Corpus

    found = []
    for name, (model, data) in CORPORA.items():
        if not all(path.exists() for path in STORIES) and name != "base":
            missing = {"corpus": name, "skipped": "../shared is not there"}
            found.append(_printed(missing))
            continue
        corpus = Corpus(model, data, rows)
        for form in ("none", *FORMATS):
            line: Line = {"corpus": name, "format": form, **corpus.size}
            try:
                line |= _rounded(corpus.perplexity(form))
            except UserError as error:
                # A group that does not divide the inputs of a model as small as this.
                line["skipped"] = " ".join(str(error).split())
            found.append(_printed(line))
    return found


def training(args: flags.FlagValues) -> list[Line]:
    """LoRA and QLoRA of ftjax and QLoRA of the peers, step by step in turns."""
    from benchmarks.shapes import SHAPES, write_checkpoint

    found: list[Line] = []
    names = chosen(args, "impl", list(MODULES))
    pythons = interpreters(args)
    with tempfile.TemporaryDirectory(prefix="ftjax-benchmark-") as folder:
        for shape in chosen(args, "shapes", list(SHAPES)):
            at = Path(folder) / shape
            write_checkpoint(at, SHAPES[shape])
            pairs = [("ftjax", "lora"), *((name, "qlora") for name in names)]
            group = [
                Row(n, MODULES[n], pythons[n], make_request(at, SHAPES[shape], task))
                for n, task in pairs
            ]
            measured = measure(group, args.steps)
            for (_, task), line in zip(pairs, measured, strict=True):
                found.append(_printed({"shape": shape, "task": TASKS[task]} | line))
    return found


def format_table(lines: list[Line]) -> str:
    """One row per format, out of the lines that name it."""
    rows: dict[str, list[Any]] = {}
    corpora = list(dict.fromkeys(x["corpus"] for x in lines if "corpus" in x))
    for name in dict.fromkeys(x["format"] for x in lines if "format" in x):
        own = [x for x in lines if x.get("format") == name]
        told = next((x for x in own if "weight" in x), {})
        row = [told.get(key) for key in ("bits", "mae", "mse", "sqnr_db")]
        for key in ("mae", "mse"):
            row.append(told[key] / told[f"{key}_expected"] if key in told else None)
        for corpus in corpora:
            row += [x.get("perplexity") for x in own if x.get("corpus") == corpus] or [
                None
            ]
        rows[name] = row + [told.get(f"{way}quantize_gb_s") for way in ("", "de")]
    headers = ["format", "bits", "MAE", "MSE", "SQNR dB", "MAE / exact", "MSE / exact"]
    headers += [f"ppl {name}" for name in corpora]
    headers += ["quantize GB/s", "dequantize GB/s"]
    return table([[name, *row] for name, row in rows.items()], headers)


def step_table(lines: list[Line]) -> str:
    """Each row's step and memory over those of ftjax's LoRA at the same shape."""
    rows = []
    for line in lines:
        name = f"{line['implementation']}, {line['task']}"
        if "skipped" in line:
            rows.append([line["shape"], name, line["skipped"]])
            continue
        own = [
            x
            for x in lines
            if x["shape"] == line["shape"]
            and x["implementation"] == "ftjax"
            and x["task"] == TASKS["lora"]
            and "skipped" not in x
        ]
        ratios = [line[k] / own[0][k] if own else None for k in ("step_s", "peak_mb")]
        values = [line["step_s"], line["tokens_per_s"], line["peak_mb"]]
        rows.append([line["shape"], name, *values, *ratios])
    headers = ["shape", "row", "step s", "tokens/s", "peak MB", "step / LoRA"]
    return table(rows, [*headers, "memory / LoRA"])


def _rounded(found: dict[str, float]) -> Line:
    return {k: x if isinstance(x, int) else float(f"{x:.6g}") for k, x in found.items()}


def _printed(line: Line) -> Line:
    print(json.dumps(line), file=sys.__stdout__, flush=True)
    return line


def define(args: flags.FlagValues) -> None:
    for flag, values, text in (
        ("parts", list(PARTS), "what to measure"),
        ("shapes", ["S", "L"], "models of the steps"),
        ("impl", list(MODULES), "implementations; what is not installed says so"),
    ):
        flags.DEFINE_list(flag, values, text, flag_values=args)
    integer = flags.DEFINE_integer
    integer("size", 2048, "inputs and outputs of the Gaussian weight", flag_values=args)
    integer("repeats", 15, "timed repeats of the speeds", flag_values=args)
    integer("rows", 60, "texts of each corpus; 0: all", flag_values=args)
    define_peers(args)


if __name__ == "__main__":
    cli.entry(main, define)
