"""Every objective learns: a short run each, what it changes, and a picture.

    python -m experiments.objectives [--on=ships] [--steps=100] [--out=DIR]

Each run has a process of its own and leaves its own report. The same command continues:
a run that is finished is not run again.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from experiments.objectives.results import (
    RESULTS,
    markdown,
    result,
    write_lines,
    write_picture,
)
from experiments.objectives.sweep import RUNS, SETS, model_of, settings
from ftjax import cli
from ftjax.console import say
from ftjax.errors import UserError
from ftjax.metrics import METRICS, read_rows

ROOT = Path(__file__).resolve().parents[2]
EVAL_ROWS = 200


def main(args: flags.FlagValues) -> dict[str, Any]:
    if args.on == "stories" and not Path(model_of(args.on)).is_dir():
        raise UserError(
            "the model of stories is not here",
            where="--on",
            expected=model_of(args.on),
            fix="--on=ships needs nothing that does not ship",
        )
    out = Path(args.out or f"runs/objectives-{args.on}")
    names = [str(name) for name in args.runs or RUNS]
    if wrong := [name for name in names if name not in RUNS]:
        known = ", ".join(RUNS)
        raise UserError("no such run", where="--runs", expected=known, got=str(wrong))
    results = []
    for number, name in enumerate(names, 1):
        say(f"[{number}/{len(names)}] {name}")
        evals = run(out, name, args.on, args.steps)
        results.append(result(name, args.on, evals, EVAL_ROWS))
        write_lines(out / RESULTS, results)
    text = markdown(results)
    (out / "table.md").write_text(text, encoding="utf-8")
    write_picture(out / "separation.png", results)
    say(f"\n{text}\n{out / RESULTS}\n{out / 'separation.png'}")
    return {"runs": results, "results": str(out / RESULTS)}


def run(out: Path, name: str, on: str, steps: int) -> list[dict[str, Any]]:
    """The evaluations of one run, which is run, or continued, if it is not finished."""
    folder = out / name.replace(" ", "-").lower()
    evals = evaluations(folder)
    if evals and evals[-1]["step"] == steps:
        return evals
    task = RUNS[name].task
    command = [sys.executable, "-m", "ftjax.train"]
    command.append(f"--config=configs/{task}.py:model={model_of(on)},method=lora")
    command += [f"--config.{k}={v}" for k, v in settings(name, on, steps).items()]
    command.append(f"--workdir={folder.resolve()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log").resolve()
    with log.open("w") as file:
        code = subprocess.call(command, cwd=ROOT, stdout=file, stderr=file)
    if code:
        raise UserError(f"{name} ended with code {code}", where=log)
    return evaluations(folder)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    rows = read_rows(folder / METRICS)
    return [row for row in rows if row.get("split") == "eval"]


def define(args: flags.FlagValues) -> None:
    flags.DEFINE_enum("on", "ships", SETS, "the model and the data", flag_values=args)
    flags.DEFINE_list("runs", [], "some of them; none: all", flag_values=args)
    flags.DEFINE_integer("steps", 100, "of each run", flag_values=args)
    flags.DEFINE_string("out", "", "the folder of all runs", flag_values=args)


if __name__ == "__main__":
    cli.entry(main, define)
