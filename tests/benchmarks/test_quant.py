"""The benchmark of quantization: its integrals, and the tables that it prints."""

from typing import Any

import numpy as np
import pytest

from benchmarks.formats import FORMATS, error, gaussian
from benchmarks.integrals import Error, expected_error
from benchmarks.quant import format_table, step_table
from benchmarks.train_step import TASKS
from ftjax.quant.formats import Format


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return gaussian(4096, 256)


@pytest.mark.parametrize("name", FORMATS)
def test_the_error_is_that_of_the_integrals(weight: np.ndarray, name: str) -> None:
    found = error(weight, name)
    assert found["mae"] == pytest.approx(found["mae_expected"], rel=0.01)
    assert found["mse"] == pytest.approx(found["mse_expected"], rel=0.01)


# bitsandbytes' own measurements over 200 matrices, in its tests.
@pytest.mark.parametrize(
    ("name", "block", "mae"),
    [
        ("nf4", 64, 0.072798),
        ("nf4", 4096, 0.092547),
        ("fp4", 64, 0.096543),
        ("fp4", 4096, 0.129536),
    ],
)
def test_the_integrals_are_what_bitsandbytes_measures(
    name: str, block: int, mae: float
) -> None:
    assert expected_error(Format(name, block), block).mae == pytest.approx(
        mae, rel=5e-4
    )


def test_one_weight_a_block_has_no_error() -> None:
    """It is its own scale; two have one error between them, which must not vanish."""
    assert expected_error(Format("int8", 1), 1) == Error(0, 0)
    assert expected_error(Format("int8", 2), 2).mae > 0


def test_a_format_has_one_row_out_of_all_lines() -> None:
    weight = {"format": "nf4", "weight": [2, 2], "bits": 4.5, "sqnr_db": 20.7}
    errors = {"mae": 0.2, "mse": 0.05, "mae_expected": 0.1, "mse_expected": 0.05}
    lines: list[dict[str, Any]] = [
        {"corpus": "stories", "skipped": "not there"},
        weight | errors,
        {"corpus": "base", "format": "nf4", "perplexity": 57.5},
    ]
    row = next(x for x in format_table(lines).splitlines() if x.startswith("nf4"))
    assert row.split() == ["nf4", "4.5", "0.2", "0.05", "20.7", "2", "1", "57.5"]


def test_steps_are_compared_with_lora_of_the_same_shape() -> None:
    line = {"implementation": "ftjax", "tokens_per_s": 9.0}
    lines: list[dict[str, Any]] = [
        {**line, "shape": "S", "task": TASKS["lora"], "step_s": 2.0, "peak_mb": 500},
        {**line, "shape": "L", "task": TASKS["lora"], "step_s": 8.0, "peak_mb": 900},
        {**line, "shape": "L", "task": TASKS["qlora"], "step_s": 9.0, "peak_mb": 450},
        {"implementation": "b", "shape": "L", "task": "x", "skipped": "not installed"},
    ]
    last, skipped = step_table(lines).splitlines()[-2:]
    assert last.split()[-2:] == ["1.125", "0.5"]
    assert skipped.endswith("not installed")
