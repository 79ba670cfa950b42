"""The report shows a run, whatever state it is in, and gives nothing away."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ftjax.curves import Series, label, loss_series, smoothed, svg_chart, ticks
from ftjax.metrics import MetricLog
from ftjax.report import PLAN, environment, write_report
from ftjax.scrub import scrubbed

VOID = {"meta", "br", "line", "path", "circle"}


class Page(HTMLParser):
    """Collects text and attributes; fails on tags that do not close."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attrs: list[tuple[str, str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attrs += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def make_run(workdir: Path, steps: int = 60) -> Path:
    workdir.mkdir(exist_ok=True)
    config = {
        "task": "sft",
        "model": {"path": "base"},
        "method": {"name": "lora", "rank": 8},
        "train": {"steps": steps},
    }
    (workdir / "config.json").write_text(json.dumps(config))
    with MetricLog(workdir, resume_step=None) as log:
        for step in range(steps + 1):
            if step % 20 == 0:
                loss = 1 + math.exp(-step / 20)
                log.write(step, "eval", loss=loss, perplexity=math.exp(loss))
                log.write_sample(step, "What is `x`?", f"answer {step}", "the truth")
            if step:
                loss = 1 + math.exp(-step / 20)
                log.write(step, "train", loss=loss, lr=1e-3, tokens_per_s=9000.0)
    return workdir


def test_the_page_has_every_part(tmp_path: Path) -> None:
    write_report(make_run(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    for part in (
        "sft · lora · base",
        "step 60 of 60",
        "eval loss, was 2.000",
        "tokens/s, median",
        "before, step 0",
        "after, step 60",
        "answer 0",
        "answer 60",
        "along the way",
        "the truth",
        "rank",
        "Environment",
        "jax",
    ):
        assert part in page.text, part
    assert page.tags.count("svg") == 3
    assert "no gradient norm was recorded" in page.text
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))


def test_the_page_needs_no_network_and_runs_nothing(tmp_path: Path) -> None:
    write_report(make_run(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    loading = ("src", "href", "srcset", "action", "data")
    assert not [a for a in page.attrs if a[1] in loading or a[1].startswith("on")]
    html = (tmp_path / "report.html").read_text()
    assert "://" not in html and "url(" not in html and "@import" not in html


def test_what_comes_from_data_is_shown_and_not_run(tmp_path: Path) -> None:
    make_run(tmp_path)
    evil = "<script>alert(1)</script>\x1b[2J\u202e\"'&"
    config = {"task": evil, evil: {evil: evil}, "model": {"path": f"$x${evil}"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with MetricLog(tmp_path, resume_step=60) as log:
        log.write_sample(0, evil, evil, evil)
        log.write_sample(60, evil, "日本語 $\\frac$", evil)
    write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "script" not in page.tags
    assert "<script>alert(1)</script>\\x1b[2J\\u202e\"'&" in page.text
    assert "\x1b" not in page.text and "\u202e" not in page.text


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_hardly_begun(tmp_path: Path, steps: int) -> None:
    write_report(make_run(tmp_path, steps))
    Page((tmp_path / "report.html").read_text())


def test_an_empty_folder_and_damaged_files(tmp_path: Path) -> None:
    write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "no metrics yet" in page.text and "config.json is not there" in page.text
    (tmp_path / "config.json").write_text("[1")
    for line in ('{"step": 1, "split": "train"', "nonsense", '{"a": 1}', '{"step": 2}'):
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        write_report(tmp_path)


def test_minus_a_reward_is_on_no_axis_with_a_loss(tmp_path: Path) -> None:
    with MetricLog(tmp_path, resume_step=None) as log:
        for step in (0, 2):
            log.write(step, "eval", loss=-0.25 * step, reward=0.25 * step)
        log.write(1, "train", loss=0.0125, reward=0.3)
    write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    charts = page.text.split("Curves")[1]
    assert charts.index("reward") < charts.index("eval") < charts.index("Loss")
    loss = charts[charts.index("Loss") :]
    assert "eval" not in loss[: loss.index("Learning rate")]
    assert "eval loss" not in page.text and "reward, was 0" in page.text


@pytest.mark.parametrize("last", [math.inf, -math.inf, math.nan])
def test_a_last_value_that_is_not_finite_is_said(tmp_path: Path, last: float) -> None:
    with MetricLog(tmp_path, resume_step=None) as log:
        for step in range(1, 4):
            log.write(step, "train", loss=1.0, grad_norm=last if step == 3 else 1.0)
    write_report(tmp_path)
    assert f"last {last:g}" in Page((tmp_path / "report.html").read_text()).text


def test_values_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    with MetricLog(tmp_path, resume_step=None) as log:
        for step in range(1, 40):
            loss = math.nan if step == 10 else math.inf if step == 20 else 2.0
            log.write(step, "train", loss=loss, grad_norm=math.nan)
        log.write(0, "eval", loss=2.0, perplexity=math.exp(2))
        log.write(40, "eval", loss=math.nan, perplexity=math.inf)
    write_report(tmp_path)
    html = (tmp_path / "report.html").read_text()
    faint = html.split('class="curve faint" d="')[1].split('"')[0]
    assert faint.count("M") == 3
    assert "no gradient norm was recorded" in html


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("train", "/data/alice/rows.jsonl", ".../rows.jsonl"),
        ("train", "~/rows/x.jsonl", ".../x.jsonl"),
        ("path", "C:\\Users\\alice\\model", ".../model"),
        ("path", "/ho" + "me/alice", "~"),
        ("path", "~alice/", "~"),
        ("path", "org/model", "org/model"),
        ("train", "../shared/x.jsonl", "../shared/x.jsonl"),
        ("api_key", "1234", "(hidden)"),
        ("hub_token", "1234", "(hidden)"),
        ("note", "with hf_abcdefghijkl inside", "with (hidden) inside"),
        ("url", "s3://me:pw@host/x", "s3://(hidden)@host/x"),
        ("tokens", 12, 12),
        ("max_new_tokens", 12, 12),
        ("targets", ["/a/b/c", "q"], [".../c", "q"]),
    ],
)
def test_scrubbed(key: str, value: object, shown: object) -> None:
    assert scrubbed({key: value}) == {key: shown}


def test_what_the_run_said_of_its_data_names_no_folder(tmp_path: Path) -> None:
    said = "source  /da" + "ta/alice/rows.jsonl\n64 x 32, a.jsonl:3/4, hf_abcdefghijkl"
    (tmp_path / PLAN).write_text(said)
    write_report(make_run(tmp_path, 1))
    text = Page((tmp_path / "report.html").read_text()).text
    assert "source  .../rows.jsonl\n64 x 32, a.jsonl:3/4, (hidden)" in text


def test_home_is_never_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    assert scrubbed(str(tmp_path / "alice")) == "~"
    assert scrubbed(str(tmp_path / "alice" / "m")) == ".../m"


def test_the_environment_is_versions_and_hardware_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import platform

    monkeypatch.setenv("WANDB_API_KEY", "canary-value")
    found = environment()
    assert {"python", "jax", "flax", "system", "CPU cores", "devices"} <= set(found)
    shown = " ".join(found.values())
    assert "canary" not in shown and platform.node() not in shown


def test_the_smoothed_curve_does_not_lag() -> None:
    line = [(float(x), 5.0 - 0.01 * x) for x in range(400)]
    inner = list(zip(line, smoothed(line), strict=True))[100:300]
    assert max(abs(y - mean) for (_, y), (_, mean) in inner) < 1e-3
    assert smoothed([(0.0, 3.0)]) == [(0.0, 3.0)]
    assert smoothed([]) == []
    jagged = [(float(x), float(x % 2)) for x in range(24)]
    calm = [mean for _, mean in smoothed(jagged)]
    assert max(calm) - min(calm) < 0.5  # a short curve is smoothed too
    flat = [(float(x), math.nan if x == 7 else 2.0) for x in range(50)]
    assert all(mean == pytest.approx(2.0) for _, mean in smoothed(flat))


def test_a_long_curve_keeps_its_spikes_and_stays_small() -> None:
    points = [(float(x), 9.0 if x == 12_345 else 1.0) for x in range(50_000)]
    chart = svg_chart("Loss", [Series("train", "line", points)])
    assert len(chart) < 20_000
    top = min(
        float(p.split(",")[1]) for p in chart.split(' d="')[1].split('"')[0].split()
    )
    assert top < 30


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(1.1, 3.9, most=4) == [2.0, 3.0]
    assert ticks(2.0, 2.0) == [2.0]
    assert [label(x) for x in (0, 2e-4, 1.25e-3, 0.25, 12_000)] == [
        "0",
        "2e-4",
        "1.25e-3",
        "0.25",
        "12.0k",
    ]


def test_series_without_points_are_left_out() -> None:
    assert loss_series([], []) == []
    assert [s.name for s in loss_series([(1.0, 1.0)], [])] == ["train"]
