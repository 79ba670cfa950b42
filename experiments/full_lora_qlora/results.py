"""From the results of the runs to their table and their picture."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
HEADERS = (
    "method",
    "trainable",
    "base, bytes",
    "of it codes, bytes",
    "LoRA, bytes",
    "optimizer, bytes",
    "peak memory, MB",
    "tokens/s",
    "eval loss",
)

Result = dict[str, Any]


def write_lines(path: Path, results: Sequence[Result]) -> None:
    """One JSON object per run."""
    text = "".join(json.dumps(result) + "\n" for result in results)
    path.write_text(text, encoding="utf-8")


def read_lines(path: Path) -> list[Result]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summary(results: Sequence[Result]) -> list[Result]:
    """One row per method, over its seeds.

    Returns:
      method, seeds; trainable and bytes, which no seed changes; base_bytes: all that
      is frozen, or trained in full; peak_mb: the largest; tokens_per_s: the median;
      loss, loss_std: mean and standard deviation (n - 1; None of one seed).
    """
    rows = []
    for method in dict.fromkeys(result["method"] for result in results):
        own = [result for result in results if result["method"] == method]
        losses = [result["loss"] for result in own]
        sizes = own[0]["bytes"]
        rows.append(
            {
                "method": method,
                "seeds": len(own),
                "trainable": own[0]["trainable"],
                "bytes": sizes,
                "base_bytes": sizes.get("params", 0) + sizes.get("quant", 0),
                "peak_mb": max(result["peak_mb"] for result in own),
                "tokens_per_s": statistics.median(x["tokens_per_s"] for x in own),
                "loss": statistics.mean(losses),
                "loss_std": statistics.stdev(losses) if len(own) > 1 else None,
            }
        )
    return rows


def markdown(rows: Sequence[Result]) -> str:
    """The table of the README."""
    lines = ["| " + " | ".join(HEADERS) + " |", "|---" * len(HEADERS) + "|"]
    for row in rows:
        sizes, spread = row["bytes"], row["loss_std"]
        cells = [row["method"], f"{row['trainable']:,}", f"{row['base_bytes']:,}"]
        cells += [
            f"{sizes[key]:,}" if key in sizes else ""
            for key in ("quant", "lora", "optimizer")
        ]
        cells += [f"{row['peak_mb']:,.0f}", f"{row['tokens_per_s']:,.0f}"]
        cells.append(f"{row['loss']:.4f}" + (f" ± {spread:.4f}" if spread else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_picture(path: Path, rows: Sequence[Result]) -> None:
    """Loss over the bytes of the base, with error bars of one standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, mark in zip(rows, "sovD^Pph*", strict=False):
        axes.errorbar(
            row["base_bytes"] / 1e6,
            row["loss"],
            yerr=row["loss_std"],
            fmt=mark,
            capsize=4,
            markersize=7,
            label=row["method"],
        )
    axes.set_xlabel("bytes of the base (MB)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
