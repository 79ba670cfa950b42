"""The table of full, LoRA and QLoRA is made from the results; the README has it too."""

from pathlib import Path
from typing import Any

import pytest

from experiments.full_lora_qlora import __main__ as runner
from experiments.full_lora_qlora.one import RESULT
from experiments.full_lora_qlora.results import (
    RESULTS,
    markdown,
    read_lines,
    summary,
    write_lines,
    write_picture,
)
from experiments.full_lora_qlora.sweep import METHODS, config, settings
from ftjax.config import validate
from ftjax.errors import UserError
from ftjax.workdir import write_json_atomic
from tests.conftest import ROOT

HOME = ROOT / "experiments" / "full_lora_qlora"


def result(method: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    found = {
        "method": method,
        "seed": seed,
        "settings": settings(method, seed, 50),
        "loss": loss,
        "trainable": 1234,
        "bytes": {"params": 1000, "quant": 500, "lora": 64, "optimizer": 128},
        "peak_mb": 400.0 + seed,
        "tokens_per_s": 900.0,
    }
    return found | more


def test_the_table_is_made_from_the_results(tmp_path: Path) -> None:
    full = result("full", 0, 4.5, bytes={"params": 3000, "optimizer": 6000})
    rows = [full, result("LoRA", 0, 4.25), result("LoRA", 1, 4.75)]
    write_lines(tmp_path / RESULTS, rows)
    told = summary(read_lines(tmp_path / RESULTS))
    assert [row["base_bytes"] for row in told] == [3000, 1500]
    assert told[1]["loss_std"] == pytest.approx(0.5 / 2**0.5)
    lines = markdown(told).splitlines()
    first = "| full | 1,234 | 3,000 |  |  | 6,000 | 400 | 900 | 4.5000 |"
    second = "| LoRA | 1,234 | 1,500 | 500 | 64 | 128 | 401 | 900 | 4.5000 ± 0.3536 |"
    assert lines[2:] == [first, second]
    write_picture(tmp_path / "loss.png", told)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_the_table_of_the_readme_is_that_of_its_results() -> None:
    table = markdown(summary(read_lines(HOME / RESULTS)))
    assert table in (HOME / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", METHODS)
def test_each_run_has_a_config_of_its_own_method(method: str) -> None:
    made = config(method, 3, 50)
    validate(made)
    quantized = made.quant.format != "none"
    assert (made.method.name == "lora") == (method != "full")
    assert quantized == method.startswith("QLoRA")
    assert made.quant.double_quant == method.endswith("double")
    assert (made.seed, made.train.steps) == (3, 50)


def test_what_is_finished_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def run(folder: Path, method: str, seed: int, steps: int) -> None:
        ran.append((method, seed))
        folder.mkdir()
        write_json_atomic(folder / RESULT, result(method, seed, 4.0))

    monkeypatch.setattr(runner, "run", run)
    for _ in range(2):
        assert runner.result_of(tmp_path, "QLoRA nf4", 7, 50)["seed"] == 7
    assert ran == [("QLoRA nf4", 7)]
    (tmp_path / "qlora-nf4-seed7" / RESULT).unlink()  # as a run that was cut off
    runner.result_of(tmp_path, "QLoRA nf4", 7, 50)
    assert len(ran) == 2
    with pytest.raises(UserError, match="other settings"):
        runner.result_of(tmp_path, "QLoRA nf4", 7, 60)
