"""What a run tells people: its plan before it starts, its result at the end."""

from pathlib import Path
from typing import Any

from ftjax import console
from ftjax.data.words import clip
from ftjax.metrics import METRICS, read_rows
from ftjax.objectives.tasks import task_of
from ftjax.prepare import Prepared, Shape, trainable_rows
from ftjax.report import PLAN
from ftjax.rl.rewards import told

PLACES = (METRICS, PLAN, "loss.png", "report.html", "checkpoints", "adapter")


def plan(config: Any, ready: Prepared) -> str:
    """The screen before a run: data, what is trained, how long."""
    base, shape, data, steps = ready.base, ready.shape, ready.data, ready.steps
    source = clip(data.settings.train, 200)
    parts = [f"train data\n  a stream, read as it comes: {source}"]
    if data.loader is not None:
        parts = [data.train.report.text()]
    if data.eval:
        parts.append(data.eval.report.text())
    else:
        parts.append("eval data\n  none: --config.data.eval=FILE names some")
    parts.append(trainable(shape))
    c = config.train
    kind = "dora" if config.method.get("use_dora") else config.method.name
    cut = f" in {c.accumulate} micro-batches" if c.accumulate > 1 else ""
    parts.append(
        f"{base.name}: {kind}{stored(config, shape)}, "
        f"{shape.dtype} computation; "
        f"{steps:,} steps of {c.batch_size} rows x {data.length} tokens{cut}, "
        f"{length_of(config, ready)}"
    )
    if task_of(config.task).online:
        parts.append(told(config.reward))
    return "\n\n".join(parts)


def length_of(config: Any, ready: Prepared) -> str:
    """How often the rows are read."""
    if ready.data.frame is not None:
        return "fewer where the stream ends before"
    rows = ready.data.rows
    read = ready.steps * config.train.batch_size
    return f"{read / rows:.3g} epochs of {rows:,} rows"


def stored(config: Any, shape: Shape) -> str:
    """What is special about the base's weights: quantized, or random."""
    if config.model.from_scratch:
        return " of random weights (model.from_scratch)"
    formats = sorted({str(fmt) for fmt in shape.formats.values()})
    return f" over {' and '.join(formats)}" if formats else ""


def trainable(shape: Shape) -> str:
    """The table of what is trained, one line per target."""
    rows = []
    for target, size, rank, layers, trained, percent in trainable_rows(shape):
        share = f"{percent:.2f}%"
        rows.append([target, size, rank, layers or None, trained, share])
    headers = ["target", "weight", "rank", "layers", "trained", "of it"]
    return console.table(rows, headers)


def evaluation(task: str, found: dict[str, float]) -> str:
    """One line for an evaluation: the loss and what tells most of its task.

    Where answers earn rewards the loss is minus those, and is not said twice.
    """
    what = task_of(task)
    loss = [] if what.online else [f"loss {found['loss']:.4f}"]
    # What no row says anything about is not there.
    there = [name for name in what.shown if name in found]
    values = [f"{name} {found[name]:.4g}" for name in there]
    return ", ".join([*loss, *values, f"{found['tokens']:,} tokens"])


def result(workdir: Path, task: str, steps: int, chat: bool) -> dict[str, Any]:
    """What `--json` prints of a run, read from its own metrics."""
    rows = read_rows(workdir / METRICS)
    evals = [row for row in rows if row.get("split") == "eval" and "loss" in row]
    train = [row for row in rows if row.get("split") == "train" and "tokens" in row]
    found: dict[str, Any] = {"workdir": str(workdir), "task": task, "steps": steps}
    found["chat"] = chat
    if train:
        found |= {"loss": train[-1]["loss"], "tokens": train[-1]["tokens"]}
        found["seconds"] = train[-1]["time"]
        found["tokens_per_s"] = sorted(r["tokens_per_s"] for r in train)[
            len(train) // 2
        ]
    if evals:
        found["eval_before"], found["eval"] = (
            {k: x for k, x in row.items() if k not in ("step", "split")}
            for row in (evals[0], evals[-1])
        )
        found["eval_best"] = min(row["loss"] for row in evals)
    found["files"] = {
        name: str(workdir / name) for name in PLACES if (workdir / name).exists()
    }
    return found


def ending(found: dict[str, Any]) -> str:
    """The last screen of a run: eval loss before and after, and where things are."""
    lines = []
    if "eval" in found:
        name = "reward" if task_of(found["task"]).online else "loss"
        before, after = found["eval_before"][name], found["eval"][name]
        lines.append(f"eval {name} {before:.4f} -> {after:.4f}")
    lines.append(console.table(list(map(list, found["files"].items()))))
    use = "chat with it" if found["chat"] else "continue text with it"
    command = f"python -m ftjax.generate --workdir={found['workdir']}"
    if found["task"] == "reward":
        use = "let it judge"
        command = f"python -m ftjax.evaluate --workdir={found['workdir']} --data=FILE"
        command += " --to=scores --out=FILE"
    lines.append(f"{use}: {command}")
    return "\n".join(lines)
