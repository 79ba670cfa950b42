"""The curves of a run: `loss.png`, and small SVG charts in the colours of the page."""

import html
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftjax.console import count

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 36
MOST_POINTS = 600


@dataclass(frozen=True)
class Series:
    """One curve: points (x, y), and how they are drawn.

    `kind` is 'faint' (raw values), 'line', or 'points' (a line with marked points); it
    is also the CSS class of what is drawn.
    """

    name: str
    kind: str
    points: Sequence[tuple[float, float]]

    def finite(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if math.isfinite(y)]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred average with exponential weights, over about a twentieth of the curve.

    It takes in some eight points at least. Looking both ways keeps it from lagging
    behind a falling loss. Values that are not finite are left out: one of them would
    erase the rest.
    """
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    before = _running([y for _, y in finite])
    after = _running([y for _, y in reversed(finite)])[::-1]
    return [
        (x, (b_sum + a_sum - y) / (b_weight + a_weight - 1))
        for (x, y), (b_sum, b_weight), (a_sum, a_weight) in zip(
            finite, before, after, strict=True
        )
    ]


def _running(values: Sequence[float]) -> list[tuple[float, float]]:
    """(sum, weight) of each value and those before it, older ones counting less."""
    keep = 1 - 1 / max(4.0, len(values) / 40)
    total = weight = 0.0
    sums = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        sums.append((total, weight))
    return sums


def loss_series(
    train: Sequence[tuple[float, float]], evals: Sequence[tuple[float, float]]
) -> list[Series]:
    """The three curves of a loss: every step, their average, the held-out points."""
    if len(train) < 20:
        every = [Series("train", "line", train)]
    else:
        mean = Series("train, smoothed", "line", smoothed(train))
        every = [Series("train", "faint", train), mean]
    return [one for one in [*every, Series("eval", "points", evals)] if one.points]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers inside [low, high], at most `most` + 1 of them."""
    rough = (high - low) / most
    if not rough > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def label(value: float) -> str:
    """A tick in few characters: 0, 0.25, 1.5, 12.3k, 2e-4."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return count(value)
    if abs(value) < 0.01:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.3g}"


def svg_chart(title: str, series: Sequence[Series], *, from_zero: bool = False) -> str:
    """One chart as inline SVG without colours of its own: classes name the parts."""
    drawn = [s for s in series if s.finite()]
    points = [point for s in drawn for point in s.finite()]
    if not points:
        return f'<p class="empty">no {html.escape(title.lower())} was recorded</p>'
    x_low, x_high = _range([x for x, _ in points], from_zero=False, margin=0.0)
    y_low, y_high = _range([y for _, y in points], from_zero, margin=0.06)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)} by step">'
    ]
    for y in ticks(y_low, y_high, most=4):
        _, at = place(x_low, y)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
            f'y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="y" x="{LEFT - 8}" y="{at + 4:.1f}">{label(y)}</text>'
        )
    for x in ticks(x_low, x_high):
        at, _ = place(x, y_low)
        parts.append(
            f'<text class="x" x="{at:.1f}" y="{HEIGHT - BOTTOM + 17}">{label(x)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="x" x="{middle:.0f}" y="{HEIGHT - 3}">step</text>')
    parts += [_svg_curve(s, place) for s in drawn]
    return "".join([*parts, "</svg>"])


def _svg_curve(
    series: Series, place: Callable[[float, float], tuple[float, float]]
) -> str:
    path: list[str] = []
    pen_down = False
    for x, y in _thinned(series.points):
        if math.isfinite(y):
            at = "{:.1f},{:.1f}".format(*place(x, y))
            path.append(("L" if pen_down else "M") + at)
        # A value that is not finite leaves a gap, where one can see it.
        pen_down = math.isfinite(y)
    drawn = f'<path class="curve {series.kind}" d="{" ".join(path)}"/>'
    if series.kind != "points":
        return drawn
    for x, y in series.finite():
        cx, cy = place(x, y)
        drawn += (
            f'<circle class="dot" cx="{cx:.1f}" cy="{cy:.1f}" r="3.2">'
            f"<title>step {x:g}: {y:.4f}</title></circle>"
        )
    return drawn


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MOST_POINTS points; each stretch keeps its lowest and highest."""
    size = math.ceil(2 * len(points) / MOST_POINTS)
    if size <= 2:
        return list(points)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=_height), max(stretch, key=_height)}
        kept += sorted(ends)
    return kept


def _height(point: tuple[float, float]) -> float:
    return point[1] if math.isfinite(point[1]) else math.inf


def _range(
    values: Sequence[float], from_zero: bool, margin: float
) -> tuple[float, float]:
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    if high <= low:
        half = abs(low) * 0.05 or 0.5
        return low - (0.0 if from_zero else half), high + half
    gap = margin * (high - low)
    return (low if from_zero else low - gap), high + gap


def write_errors_png(
    path: Path, kinds: Mapping[str, Sequence[tuple[int, float]]], title: str
) -> None:
    """Draws relative errors by layer, one line for each kind of projection."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(8, 4.5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, points in kinds.items():
        axes.plot(*zip(*points, strict=True), label=kind, marker="o", ms=3.5, lw=1.4)
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of the weight")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#d7dbe2", linewidth=0.7)
    axes.legend(frameon=False, ncols=2, fontsize=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, format="png")


def write_loss_png(
    path: Path, panels: Sequence[tuple[str, Sequence[Series]]], title: str
) -> None:
    """Draws curves by step to a PNG file, replaced in one rename.

    Args:
      path: of the file.
      panels: (label of the axis, curves), side by side; the loss is the first.
      title: over them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 8 if len(panels) == 1 else 5.5 * len(panels)
    figure = Figure(figsize=(width, 4.5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label_of, series) in zip(drawn, panels, strict=True):
        _draw(axes, label_of, series)
    style = {"fontsize": 12, "fontweight": "bold", "parse_math": False}
    drawn[0].set_title(title, loc="left", **style)
    partial = path.with_name(path.name + ".partial")
    with warnings.catch_warnings():
        # A title in a script that the font lacks is drawn as boxes: no reason to stop.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(partial, format="png")
    partial.replace(path)


def _draw(axes: Any, label_of: str, series: Sequence[Series]) -> None:
    from matplotlib.ticker import MaxNLocator

    looks: dict[str, dict[str, Any]] = {
        "faint": {"color": "#2f6fed", "alpha": 0.25, "linewidth": 1.0},
        "line": {"color": "#2f6fed", "linewidth": 2.0},
        "points": {"color": "#d9580d", "linewidth": 1.4, "marker": "o", "ms": 5},
    }
    for one in series:
        axes.plot(*zip(*one.points, strict=True), label=one.name, **looks[one.kind])
    axes.set_xlabel("step")
    axes.set_ylabel(label_of)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#d7dbe2", linewidth=0.7)
    axes.set_axisbelow(True)
    if series:
        axes.legend(frameon=False)
