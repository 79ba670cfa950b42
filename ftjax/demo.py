"""The main job on what ships with ftjax, in minutes on a CPU: `make demo`.

    python -m ftjax.demo

It runs `ftjax.train` as the line that it prints first says, in a fresh folder under
runs/, and adds only a look at the same answers before and after.
"""

import sys
import textwrap
from pathlib import Path
from typing import Any

from absl import flags

from configs import sft
from ftjax import cli, runtime
from ftjax.console import say, table
from ftjax.metrics import SAMPLES, read_rows

CONFIG = "configs/sft.py"
VALUES = {
    "method.rank": 8,
    "method.alpha": 16.0,
    "optim.lr": 3e-3,
    "train.steps": 200,
    "train.batch_size": 8,
    "train.eval_every": 50,
    "train.save_every": 50,
    "train.sample_tokens": 48,
    "data.max_length": 256,
}
COLUMN = 38  # two of them, and what is between, fit a terminal of 80


def main(args: flags.FlagValues) -> dict[str, Any]:
    from ftjax import describe, train  # after the flags: they start JAX

    workdir = fresh_folder(Path(args.runs))
    words = [f"--config={CONFIG}"]
    words += [f"--config.{key}={value}" for key, value in VALUES.items()]
    command = textwrap.wrap(
        " ".join(["python -m ftjax.train", *words, f"--workdir={workdir}"]),
        width=78,
        initial_indent="    ",
        subsequent_indent="        ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    say("The same as:\n\n" + " \\\n".join(command) + "\n")
    config = sft.get_config()
    config.update_from_flattened_dict(VALUES)
    result = train.run(config, str(workdir))
    say("\n" + side_by_side(read_rows(workdir / SAMPLES)))
    say("So small a model learns the form of an answer, and few facts.\n")
    say(describe.ending(result).replace("python -m", f"{python()} -m"))
    return result


def fresh_folder(runs: Path) -> Path:
    """The first of runs/demo, runs/demo-2, ... that is not there yet."""
    folder, number = runs / "demo", 1
    while folder.exists():
        number += 1
        folder = runs / f"demo-{number}"
    return folder


def side_by_side(samples: list[dict[str, Any]]) -> str:
    """Each prompt with its first and last answer in two columns, and the right one."""
    told: dict[str, list[dict[str, Any]]] = {}
    for row in samples:
        told.setdefault(row["prompt"], []).append(row)
    parts = []
    for prompt, rows in told.items():
        answers = [rows[0]["text"], rows[-1]["text"]]
        before, after = (" ".join(text.split()) or "(nothing)" for text in answers)
        columns = table([[before, after]], ["before", "after"], wrap=COLUMN)
        right = textwrap.fill(f"docstring: {rows[0]['reference']}", 2 * COLUMN)
        parts.append(f"{_asked(prompt)}\n\n{columns}\n\n{right}\n")
    return "\n".join(parts)


def _asked(prompt: str) -> str:
    """The question alone: a sample's prompt has the names of the speakers around it."""
    return prompt.removeprefix("user\n").removesuffix("\nassistant").strip()


def python() -> str:
    """This Python as one would type it here."""
    here = Path(sys.executable)
    local = here.is_relative_to(Path.cwd())
    return str(here.relative_to(Path.cwd())) if local else "python"


def define(args: flags.FlagValues) -> None:
    flags.DEFINE_string("runs", "runs", "where the run goes", flag_values=args)


if __name__ == "__main__":
    runtime.prepare()
    cli.entry(main, define)
