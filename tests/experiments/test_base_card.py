"""The model card says what the run recorded, and nothing else."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import pretrain
from experiments.base.card import card
from ftjax.errors import UserError
from tests.conftest import ROOT

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    for name in FILES:
        shutil.copy(ROOT / "ftjax" / "base" / name, folder)
    save_file({"a": np.zeros((10, 7)), "b": np.zeros(3)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    config = pretrain.get_config()
    config.seed = 1234
    (folder / "config.json").write_text(config.to_json())
    rows = []
    for step, loss in ((0, 8.0), (100, 3.5), (200, 3.25), (300, 3.3)):
        told = {"step": step, "loss": loss}
        rows.append({**told, "split": "train", "tokens": step * 99, "time": step * 6.0})
        rows.append({**told, "split": "eval", "tokens": 5})
    write_lines(folder / "metrics.jsonl", rows)
    samples = [
        {"step": 0, "prompt": "The module json", "text": "zq zq"},
        {"step": 200, "prompt": "The module\njson", "text": "reads\n\nand writes."},
        {"step": 300, "prompt": "The module json", "text": "zq of the last step"},
    ]
    write_lines(folder / "samples.jsonl", samples)
    return folder


def fact(text: str, name: str) -> str:
    match = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.M)
    assert match, name
    return match[1]


def test_the_card_tells_of_the_best_evaluation(workdir: Path, base: Path) -> None:
    text = card(workdir, base)
    assert "A Llama of 73 parameters (7 layers" in text
    assert fact(text, "held-out loss") == "3.25"
    assert fact(text, "steps") == "200"
    assert fact(text, "tokens seen") == "19,800"
    assert fact(text, "time") == "20m 00s"
    assert fact(text, "seed") == "1,234"
    # Bytes per token of the held-out part are near 3.5.
    bits = float(fact(text, "bits per byte, held out"))
    assert 3.25 / math.log(2) / bits == pytest.approx(3.5, rel=0.1)
    assert "> **The module json** reads and writes." in text
    assert "zq" not in text


def test_a_step_can_be_named(workdir: Path, base: Path) -> None:
    assert fact(card(workdir, base, 300), "held-out loss") == "3.3"


def test_a_step_without_evaluation_is_refused(workdir: Path, base: Path) -> None:
    with pytest.raises(UserError, match="no such evaluation"):
        card(workdir, base, 150)
