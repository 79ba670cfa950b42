"""Every objective learns: a short run each, what it changes, and a picture.

    python -m experiments.objectives [--on=ships] [--steps=100] [--out=DIR]

Each run has a process of its own and leaves its own report. The same command continues:
a run that is finished is not run again.
"""

import statistics
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
from experiments.objectives.sweep import (
    RUNS,
    SETS,
    folder_of,
    model_of,
    settings,
    write_code,
)
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
    write_code(out)
    results = []
    for number, name in enumerate(names, 1):
        say(f"[{number}/{len(names)}] {name}")
        evals, kl = run(out, name, args.on, args.steps)
        results.append(result(name, args.on, evals, EVAL_ROWS, kl))
        write_lines(out / RESULTS, results)
    text = markdown(results)
    (out / "table.md").write_text(text, encoding="utf-8")
    write_picture(out / "separation.png", results)
    say(f"\n{text}\n{out / RESULTS}\n{out / 'separation.png'}")
    return {"runs": results, "results": str(out / RESULTS)}


def run(
    out: Path, name: str, on: str, steps: int
) -> tuple[list[dict[str, Any]], float | None]:
    """(evaluations, KL) of one run, which is run, or continued, if it is not finished.

    The KL is the mean over the last quarter of the steps.
    """
    folder = folder_of(name, out)
    found = recorded(folder, steps)
    if found[0] and found[0][-1]["step"] == steps:
        return found
    task = RUNS[name].task
    command = [sys.executable, "-m", "ftjax.train"]
    command.append(f"--config=configs/{task}.py:model={model_of(on)},method=lora")
    command += [f"--config.{k}={v}" for k, v in settings(name, on, steps, out).items()]
    command.append(f"--workdir={folder.resolve()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log").resolve()
    with log.open("w") as file:
        code = subprocess.call(command, cwd=ROOT, stdout=file, stderr=file)
    if code:
        raise UserError(f"{name} ended with code {code}", where=log)
    return recorded(folder, steps)


def recorded(folder: Path, steps: int) -> tuple[list[dict[str, Any]], float | None]:
    rows = read_rows(folder / METRICS)
    evals = [row for row in rows if row.get("split") == "eval"]
    late = [row for row in rows if row["step"] > steps * 3 // 4]
    kls = [row["kl"] for row in late if row.get("split") == "train" and "kl" in row]
    return evals, statistics.mean(kls) if kls else None


def define(args: flags.FlagValues) -> None:
    flags.DEFINE_enum("on", "ships", SETS, "the model and the data", flag_values=args)
    flags.DEFINE_list("runs", [], "some of them; none: all", flag_values=args)
    flags.DEFINE_integer("steps", 100, "of each run", flag_values=args)
    flags.DEFINE_string("out", "", "the folder of all runs", flag_values=args)


if __name__ == "__main__":
    cli.entry(main, define)
