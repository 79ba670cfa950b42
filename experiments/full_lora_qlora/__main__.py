"""Full fine-tuning, LoRA and QLoRA on the shipped base: loss, memory, speed.

    python -m experiments.full_lora_qlora [--steps=100] [--seeds=0,1,2] [--out=DIR]

Each run has a process of its own, one after the other. The same command continues: a
run that is finished is not run again, one that was cut off starts over.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from experiments.full_lora_qlora.one import RESULT
from experiments.full_lora_qlora.results import (
    RESULTS,
    markdown,
    summary,
    write_lines,
    write_picture,
)
from experiments.full_lora_qlora.sweep import METHODS, SEEDS, STEPS, settings
from ftjax import cli
from ftjax.console import say
from ftjax.errors import UserError
from ftjax.workdir import read_json

ROOT = Path(__file__).resolve().parents[2]


def main(args: flags.FlagValues) -> dict[str, Any]:
    out = Path(args.out)
    methods = [str(name) for name in args.methods or ()]
    wrong = [name for name in methods if name not in METHODS]
    if wrong:
        known = "; ".join(METHODS)
        raise UserError(
            "no such method", where="--methods", expected=known, got=", ".join(wrong)
        )
    # Seed by seed: what slows the machine for a while slows every method.
    chosen = [(m, int(s)) for s in args.seeds for m in methods or METHODS]
    results = []
    for number, (method, seed) in enumerate(chosen, 1):
        say(f"[{number}/{len(chosen)}] {method}, seed {seed}")
        results.append(result_of(out, method, seed, args.steps))
        write_lines(out / RESULTS, results)
    text = markdown(summary(results))
    (out / "table.md").write_text(text, encoding="utf-8")
    write_picture(out / "loss.png", summary(results))
    say(f"\n{text}\n{out / RESULTS}\n{out / 'loss.png'}")
    return {"methods": summary(results), "results": str(out / RESULTS)}


def result_of(out: Path, method: str, seed: int, steps: int) -> dict[str, Any]:
    """The result of one run, which is run if it is not finished.

    Raises:
      UserError: the folder has a run of other settings, or this one failed.
    """
    name = "".join(c if c.isalnum() else "-" for c in method.lower())
    folder = out / f"{name}-seed{seed}"
    told = folder / RESULT
    if not told.exists():
        if folder.exists():
            # Its peak memory would not be that of a whole run.
            say(f"  {folder} was cut off: it starts over")
            shutil.rmtree(folder)
        run(folder, method, seed, steps)
    found: dict[str, Any] = read_json(told)
    if found["settings"] != settings(method, seed, steps):
        raise UserError(
            "a run with other settings is there",
            where=told,
            fix="choose another --out",
        )
    return found


def run(folder: Path, method: str, seed: int, steps: int) -> None:
    """One run in a process of its own; what it says goes to `FOLDER.log`."""
    command = [sys.executable, "-m", "experiments.full_lora_qlora.one"]
    command += [f"--method={method}", f"--seed={seed}", f"--steps={steps}"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log").resolve()
    with log.open("w") as file:
        command.append(f"--out={folder.resolve()}")
        code = subprocess.call(command, cwd=ROOT, stdout=file, stderr=file)
    if code:
        raise UserError(f"{method} ended with code {code}", where=log)


def define(args: flags.FlagValues) -> None:
    flags.DEFINE_list("methods", [], "some of them; none: all", flag_values=args)
    seeds = [str(seed) for seed in SEEDS]
    flags.DEFINE_list("seeds", seeds, "one run each", flag_values=args)
    flags.DEFINE_integer("steps", STEPS, "of each run", flag_values=args)
    out = "runs/full_lora_qlora"
    flags.DEFINE_string("out", out, "the folder of all runs", flag_values=args)


if __name__ == "__main__":
    cli.entry(main, define)
