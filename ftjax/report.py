"""`loss.png` and `report.html`: what a run did, in a picture and in one page.

The page is one file that needs no network and runs no script. All that comes from data
is escaped; the config is shown without secrets and without the folders it names, which
tend to hold user names.
"""

import html
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ftjax import curves
from ftjax.console import count, duration, printable
from ftjax.meanings import MEANINGS
from ftjax.metrics import METRICS, SAMPLES, read_rows
from ftjax.scrub import scrubbed, scrubbed_text

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "tokenizers",
)
PLAN = "plan.txt"  # what a run said of its data and of what it trains
LONGEST_TEXT = 4000
LOSS_OF_TOKENS = "loss (nats per trained token)"
# Beside the loss, where a run has them: the numbers at the top, the curves.
TILES = ("loss", "perplexity", "rewards/accuracies_fair", "accuracy_fair", "reward")
CHARTS = (
    "reward",
    "completions/mean_length",
    "rewards/accuracies_fair",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "accuracy_fair",
    "margin",
    "kl",
    "objective/kl",
    "nll",
)

Row = dict[str, Any]


def write_report(workdir: Path) -> None:
    """Writes `loss.png` and `report.html` into a run's folder from what it recorded.

    Reads metrics.jsonl, samples.jsonl and config.json; any of them may be missing or
    end early, and the page says so.
    """
    workdir = Path(workdir)
    rows = _read_metrics(workdir / METRICS)
    samples = read_rows(workdir / SAMPLES)
    config = _read_config(workdir / "config.json")
    loss = curves.loss_series(
        _points(rows, "train", "loss"), _points(rows, "eval", "loss")
    )
    title = _title(config, workdir)
    curves.write_loss_png(workdir / "loss.png", _panels(rows, loss), title)
    page = _page(title, rows, samples, config, loss, _read_text(workdir / PLAN))
    partial = workdir / "report.html.partial"
    partial.write_text(page, encoding="utf-8")
    partial.replace(workdir / "report.html")


def _read_metrics(path: Path) -> list[Row]:
    """The rows; without an eval loss that is minus a reward, which is there too."""
    rows = read_rows(path)
    for row in rows:
        if row.get("split") == "eval" and "reward" in row:
            row.pop("loss", None)
    return rows


def _panels(
    rows: list[Row], loss: list[curves.Series]
) -> list[tuple[str, list[curves.Series]]]:
    """The loss, and what tells most beside it, where the task has such a number."""
    for name in CHARTS:
        points = _points(rows, "train", name), _points(rows, "eval", name)
        if any(points):
            both = [("loss", loss), (name, curves.loss_series(*points))]
            return both[::-1] if name == "reward" else both
    return [(LOSS_OF_TOKENS, loss)]


def environment() -> dict[str, str]:
    """Versions and hardware, with nothing that names a person or a machine."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["CPU cores"] = str(os.cpu_count())
    if "jax" in sys.modules:
        import jax

        kinds = [device.device_kind for device in jax.devices()]
        found["devices"] = ", ".join(
            f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds))
        )
    return found


def _read_text(path: Path) -> str:
    """A text that can be published: no secret, no folder of this machine."""
    try:
        return scrubbed_text(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return ""


def _read_config(path: Path) -> Row:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return scrubbed(config) if isinstance(config, dict) else {}


def _title(config: Row, workdir: Path) -> str:
    stored = _section(config, "quant").get("format")
    names = [
        config.get("task"),
        _section(config, "method").get("name"),
        stored if stored != "none" else None,
        str(_section(config, "model").get("path") or "").rsplit("/", 1)[-1],
    ]
    known = [printable(str(name)).replace("\n", " ") for name in names if name]
    return " · ".join(known) or printable(workdir.resolve().name)


def _section(config: Row, name: str) -> Row:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _points(rows: list[Row], split: str, name: str) -> list[tuple[float, float]]:
    return [
        (float(row["step"]), float(row[name]))
        for row in rows
        if row.get("split") == split and isinstance(row.get(name), int | float)
    ]


def _page(
    title: str,
    rows: list[Row],
    samples: list[Row],
    config: Row,
    loss: Sequence[curves.Series],
    plan: str,
) -> str:
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    last = max((int(row["step"]) for row in rows), default=0)
    planned = _section(config, "train").get("steps")
    of = f" of {planned:,}" if isinstance(planned, int) and planned > 0 else ""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{_esc(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>",
            f'<header><p class="over">ftjax run</p><h1>{_esc(title)}</h1>'
            f'<p class="lead">step {last:,}{of}</p></header>',
            _results(rows),
            _curves(rows, loss),
            _samples(samples),
            _plan(plan),
            _config(config),
            f"<h2>Environment</h2>\n{_facts(environment())}",
            "<footer>Written by ftjax from metrics.jsonl, samples.jsonl and "
            "config.json of this run.</footer>\n</body>\n</html>\n",
        ]
    )


def _results(rows: list[Row]) -> str:
    evals = [row for row in rows if row.get("split") == "eval"]
    speeds = [y for _, y in _points(rows, "train", "tokens_per_s") if math.isfinite(y)]
    tiles = []
    if evals:
        first, last = evals[0], evals[-1]
        for name in TILES:
            if name in first and name in last:
                shown = MEANINGS[name].shown
                before = shown.format(first[name])
                was = f", was {before}" if len(evals) > 1 else ""
                title = "eval loss" if name == "loss" else name
                tiles.append((title + was, shown.format(last[name])))
    if speeds:
        speed = statistics.median(speeds)
        tiles.append(("tokens/s, median", count(speed)))
    for name, title, said in (
        ("tokens", "trained tokens", count),
        ("time", "training time", duration),
    ):
        values = _points(rows, "train", name)
        if values:
            tiles.append((title, said(values[-1][1])))
    if not tiles:
        return '<p class="empty">This run has recorded no metrics yet.</p>'
    cards = "".join(
        f'<div class="tile"><b>{_esc(value)}</b><span>{_esc(title)}</span></div>'
        for title, value in tiles
    )
    return f'<div class="tiles">{cards}</div>\n{_eval_table(evals)}'


def _eval_table(evals: list[Row]) -> str:
    if len(evals) < 2:
        return ""
    first, last = evals[0], evals[-1]
    best = min(evals, key=lambda row: _loss_of(row))
    columns = [("before", first), ("after", last)]
    if best is not last:
        columns.append(("best", best))
    head = "".join(f"<th>{name}, step {row['step']:,}</th>" for name, row in columns)
    body = []
    for name, (shown, sign, text) in MEANINGS.items():
        if not all(isinstance(row.get(name), int | float) for _, row in columns):
            continue
        cells = "".join(f"<td>{shown.format(row[name])}</td>" for _, row in columns)
        change = last[name] - first[name]
        better = ' class="better"' if change * sign > 0 else ""
        cells += f"<td{better}>{shown.replace(':', ':+').format(change)}</td>"
        body.append(f'<tr><th title="{_esc(text)}">{name}</th>{cells}</tr>')
    return (
        '<div class="scroll"><table class="results"><thead><tr><th></th>'
        f"{head}<th>change</th></tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _loss_of(row: Row) -> float:
    loss = row.get("loss", -row.get("reward", -math.inf))
    return loss if math.isfinite(loss) else math.inf


def _curves(rows: list[Row], loss: Sequence[curves.Series]) -> str:
    charts: dict[str, Sequence[curves.Series]] = {"Loss": loss}
    for name in CHARTS:
        both = _points(rows, "train", name), _points(rows, "eval", name)
        charts[name] = curves.loss_series(*both)
    if charts["reward"]:  # then the loss says nothing, and comes last
        charts["Loss"] = charts.pop("Loss")
    figures = []
    for name, series in charts.items():
        keys = "".join(f'<i class="{one.kind}"></i>{_esc(one.name)}' for one in series)
        if series or name == "Loss":
            figures.append(_figure(name, keys, curves.svg_chart(name, series)))
    for name, title in (
        ("lr", "Learning rate"),
        ("grad_norm", "Gradient norm"),
        ("tokens_per_s", "Tokens per second"),
    ):
        points = _points(rows, "train", name)
        chart = curves.svg_chart(
            title, [curves.Series(title, "line", points)], from_zero=True
        )
        latest = f"last {curves.label(points[-1][1])}" if points else ""
        figures.append(_figure(title, latest, chart))
    return f'<h2>Curves</h2>\n<div class="charts">{"".join(figures)}</div>'


def _figure(title: str, aside: str, chart: str) -> str:
    caption = f"<figcaption>{_esc(title)}<span>{aside}</span></figcaption>"
    return f"<figure>{caption}{chart}</figure>"


def _samples(samples: list[Row]) -> str:
    by_prompt: dict[str, list[Row]] = {}
    for row in samples:
        by_prompt.setdefault(str(row.get("prompt", "")), []).append(row)
    if not by_prompt:
        return ""
    return "<h2>Samples</h2>\n" + "\n".join(
        _sample(prompt, rows) for prompt, rows in by_prompt.items()
    )


def _sample(prompt: str, rows: list[Row]) -> str:
    first, *between, last = rows if len(rows) > 1 else (None, rows[0])
    sides = [("before", first), ("after", last)] if first else [("after", last)]
    pair = "".join(
        f'<div class="{side}"><span class="tag">{side}, {_step(row)}'
        f'</span><p class="text">{_text(row.get("text"))}</p></div>'
        for side, row in sides
        if row
    )
    more = "".join(
        f'<span class="tag">{_step(row)}</span>'
        f'<p class="text">{_text(row.get("text"))}</p>'
        for row in between
    )
    folded = (
        f"<details><summary>along the way</summary>{more}</details>" if more else ""
    )
    if last.get("reference"):
        folded += (
            "<details><summary>reference</summary>"
            f'<p class="text">{_text(last["reference"])}</p></details>'
        )
    return (
        f'<article class="sample"><p class="prompt">{_text(prompt)}</p>'
        f'<div class="pair">{pair}</div>{folded}</article>'
    )


def _step(row: Row) -> str:
    reward = row.get("reward")
    earns = f", reward {reward:.4g}" if isinstance(reward, int | float) else ""
    return f"step {int(row['step']):,}{earns}"


def _plan(plan: str) -> str:
    """The account of the data and of the trained weights, as the console showed it."""
    return f"<h2>Data</h2>\n<pre>{_esc(plan)}</pre>" if plan else ""


def _config(config: Row) -> str:
    if not config:
        return '<h2>Config</h2>\n<p class="empty">config.json is not there.</p>'
    plain = {k: v for k, v in config.items() if not isinstance(v, dict)}
    groups = [("run", plain)] if plain else []
    groups += [(k, v) for k, v in config.items() if isinstance(v, dict) and v]
    sections = "".join(
        f"<section><h3>{_esc(name)}</h3>{_facts(values)}</section>"
        for name, values in groups
    )
    return f'<h2>Config</h2>\n<div class="sections">{sections}</div>'


def _facts(values: Row) -> str:
    rows = "".join(
        f"<tr><th>{_esc(str(name))}</th><td><code>{_esc(_value(value))}</code></td></tr>"
        for name, value in values.items()
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, ensure_ascii=False)


def _text(text: Any) -> str:
    text = str(text if text is not None else "")
    cut = text[:LONGEST_TEXT] + ("…" if len(text) > LONGEST_TEXT else "")
    return _esc(cut) or "(empty)"


def _esc(text: str) -> str:
    return html.escape(printable(text))
