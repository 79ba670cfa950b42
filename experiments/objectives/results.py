"""From the metrics of the runs to their table and their picture."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.objectives.sweep import RUNS

Row = dict[str, Any]
RESULTS = "results.jsonl"
SURE = 2.0  # standard errors
LINES = ("logps/chosen", "logps/rejected")


def result(
    name: str, on: str, evals: Sequence[Row], rows: int, kl: float | None = None
) -> Row:
    """What a run has changed.

    Args:
      name: of RUNS.
      on: the set.
      evals: the rows of its metrics that are evaluations, in order.
      rows: that were evaluated: a share of them has an error bar.
      kl: of a policy that answered itself, from its reference, per token.
    """
    run = RUNS[name]
    before, after = (float(row[run.metric]) for row in (evals[0], evals[-1]))
    error = None
    if run.chance is not None:
        error = math.sqrt(max(after * (1 - after), 1e-9) / rows)
        learned = after - run.chance > SURE * error
    else:
        learned = (after - before) * run.more > 0
    kept = [{k: row[k] for k in ("step", run.metric, *LINES) if k in row}
            for row in evals]  # fmt: skip
    return {
        "run": name,
        "on": on,
        "task": run.task,
        "metric": run.metric,
        "before": before,
        "after": after,
        "error": error,
        "rows": rows,
        "learned": learned,
        "kl": kl if run.task in ("grpo", "ppo") else None,
        "evals": kept,
    }


def write_lines(path: Path, results: Sequence[Row]) -> None:
    """One JSON object per run."""
    text = "".join(json.dumps(one) + "\n" for one in results)
    path.write_text(text, encoding="utf-8")


def read_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def markdown(results: Sequence[Row]) -> str:
    """The table of the README."""
    lines = ["| run | metric on held-out rows | before | after | learned | KL |"]
    lines.append("|---|---|---|---|---|---|")
    for one in results:
        error = one["error"]
        after = f"{one['after']:.4g}" + (f" ± {error:.2g}" if error else "")
        yes = "yes" if one["learned"] else "no"
        kl = "" if one["kl"] is None else f"{one['kl']:.3g}"
        metric, before = f"`{one['metric']}`", f"{one['before']:.4g}"
        cells = (one["run"], metric, before, after, yes, kl)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_picture(path: Path, results: Sequence[Row]) -> None:
    """Log-probabilities of both sides under SFT on the chosen and under ORPO.

    The figure 3 of the ORPO paper (arXiv 2403.07691): imitation of the chosen answers
    raises the rejected ones too.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [one for one in results if one["run"] in ("SFT on chosen", "ORPO")]
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(len(shown), 1), sharey=True, squeeze=False)[0]
    for axes, one in zip(panels, shown, strict=False):
        steps = [row["step"] for row in one["evals"]]
        for name, mark in zip(LINES, ("o-", "s--"), strict=True):
            axes.plot(steps, [row[name] for row in one["evals"]], mark, label=name)
        axes.set_title(one["run"], loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("log p per token, held out")
    if shown:
        panels[0].legend(frameon=False)
    figure.savefig(path)
