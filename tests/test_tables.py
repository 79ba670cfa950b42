"""The tables that are generated stand as they are generated, and say what is there."""

import importlib
from typing import Any

import pytest

from ftjax import meanings, names
from ftjax.cli import leaves
from tests.cli import run_cli
from tests.conftest import ROOT

FILES = [p.stem for p in sorted((ROOT / "configs").glob("*.py")) if p.stem[0] != "_"]


@pytest.mark.parametrize(
    ("file", "made"),
    [
        ("ftjax/objectives/README.md", meanings.table),
        ("configs/README.md", names.table),
    ],
)
def test_a_table_is_the_generated_one(file: str, made: Any) -> None:
    assert made() in (ROOT / file).read_text(encoding="utf-8")


def test_every_key_that_has_another_name_is_there() -> None:
    modules = [importlib.import_module(f"configs.{name}") for name in FILES]
    makers = [m.get_config for m in modules if hasattr(m, "get_config")]
    assert len(makers) > 10
    keys = {"--workdir"}
    for make in makers:
        keys.update(key for key, _ in leaves(make("method=lora")))
    missing = {ours.key for ours in names.NAMES.values()} - keys
    assert not missing


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--config.loss.kl_coef=1", "did you mean loss.beta?"),
        ("--config.train.gradient_accumulation_steps=2", "train.accumulate?"),
        ("--learning_rate=1", "did you mean --config.optim.lr?"),
        ("--lr=1", "did you mean --config.optim.lr?"),
    ],
)
def test_another_name_is_answered_with_ours(typed: str, meant: str) -> None:
    run_cli("train", "--config=configs/ppo.py", typed).refused(meant)
