"""The table of what every objective learns is made from the results."""

from pathlib import Path
from typing import Any

import pytest

from experiments.objectives import results
from experiments.objectives.sweep import RUNS, SETS, config
from ftjax.config import validate
from ftjax.meanings import MEANINGS
from tests.conftest import ROOT

HOME = ROOT / "experiments" / "objectives"


@pytest.mark.parametrize("on", SETS)
@pytest.mark.parametrize("name", RUNS)
def test_every_run_has_a_config_and_a_metric_that_means_something(
    name: str, on: str, tmp_path: Path
) -> None:
    made = config(name, on, 40, tmp_path)
    validate(made)
    assert made.task == RUNS[name].task and made.train.steps == 40
    assert RUNS[name].metric in MEANINGS


def test_a_judge_is_trained_before_who_is_judged() -> None:
    names = list(RUNS)
    judged = {name: run.judge for name, run in RUNS.items() if run.judge}
    assert judged
    for name, judge in judged.items():
        assert RUNS[judge].task == "reward" and names.index(judge) < names.index(name)


def evals(metric: str, *values: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": i, metric: v} for i, v in enumerate(values)]
    return [{**r, "logps/chosen": -1.0, "logps/rejected": -2.0} for r in rows]


def test_a_share_must_be_outside_its_error_bar() -> None:
    metric = RUNS["reward model"].metric
    near = results.result("reward model", "ships", evals(metric, 0.5, 0.55), 200)
    far = results.result("reward model", "ships", evals(metric, 0.5, 0.65), 200)
    assert not near["learned"] and far["learned"]
    assert far["error"] == pytest.approx((0.65 * 0.35 / 200) ** 0.5)
    fell = results.result("GT", "ships", evals("perplexity", 9.0, 8.0), 200)
    rose = results.result("GT", "ships", evals("perplexity", 8.0, 9.0), 200)
    assert fell["learned"] and not rose["learned"]


def test_table_and_picture(tmp_path: Path) -> None:
    both = [
        results.result(name, "ships", evals(RUNS[name].metric, 0.0, 1.0), 200)
        for name in ("SFT on chosen", "ORPO")
    ]
    results.write_lines(tmp_path / "r.jsonl", both)
    assert results.read_lines(tmp_path / "r.jsonl") == both
    assert "| ORPO | `log_odds_chosen` | 0 | 1 | yes |  |" in results.markdown(both)
    results.write_picture(tmp_path / "p.png", both)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("on", SETS)
def test_the_table_of_the_readme_is_that_of_its_results(on: str) -> None:
    found = results.read_lines(HOME / f"{on}.jsonl")
    assert [one["run"] for one in found] == list(RUNS)
    table = results.markdown(found)
    assert table in (HOME / "README.md").read_text(encoding="utf-8")
