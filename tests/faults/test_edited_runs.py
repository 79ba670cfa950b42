"""A finished run whose files were changed by hand: refused, never quietly another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs import dpo
from ftjax import cli, evaluate, export, train
from tests.faults.commands import copy_model, write_rows

PAIRS = [
    {"prompt": f" on {i}", "chosen": " the thing", "rejected": " in a re"}
    for i in range(8)
]
Ask = Callable[..., str]


@pytest.fixture(scope="module")
def whole(tiny: Path, shelf: Path) -> Path:
    """A short run of DPO, and the base beside it."""
    base = copy_model(tiny, shelf / "base")
    config = dpo.get_config(f"model={base}")
    rows = str(write_rows(shelf / "edited.jsonl", PAIRS))
    config.data.update({"train": rows, "eval": rows, "max_length": 48})
    config.train.update({"steps": 2, "batch_size": 4, "sample_rows": 0})
    config.log.tensorboard = False
    train.run(config, str(shelf / "edited"))
    return shelf / "edited"


@pytest.fixture
def ask(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs a command on a copy of the run, changed; returns the screen."""

    def run(entry: Any, change: Callable[[Any], Any], code: int = 2) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        config = json.loads((copy / "config.json").read_text())
        change(config)
        (copy / "config.json").write_text(json.dumps(config))
        argv = [f"--workdir={copy}"]
        if entry is export:
            argv += ["--to=peft", f"--out={tmp_path / 'out'}"]
        capsys.readouterr()
        got = cli.run(entry.main, argv, entry.define, config=entry is evaluate)
        shown = capsys.readouterr()
        assert got == code, shown.err
        return shown.err

    return run


def put(section: str, key: str, value: Any) -> Callable[[Any], Any]:
    return lambda config: config[section].update({key: value})


@pytest.mark.parametrize("entry", [evaluate, export])
@pytest.mark.parametrize(
    ("change", "part"),
    [
        (put("method", "alpha", 320.0), "method.alpha"),
        (put("method", "alpha", "big"), "method.alpha"),
        (put("method", "rank", "x"), "method.rank"),
        (put("quant", "format", "nf4"), "quant.format"),
        (put("model", "path", None), "model.path"),
        (lambda config: config.update(method=[]), "method"),
        (lambda config: config.update(data=None), "data"),
    ],
    ids=["alpha", "text", "rank", "quant", "path", "method", "data"],
)
def test_values_of_the_run(entry: Any, change: Any, part: str, ask: Ask) -> None:
    assert part in ask(entry, change)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (put("loss", "beta", "x"), "loss.beta"),
        (lambda config: config["loss"].pop("beta"), "`beta`"),
        (lambda config: config.update(task="orpo"), "`nll_scope`"),
    ],
    ids=["text", "gone", "task"],
)
def test_settings_of_the_loss(change: Any, part: str, ask: Ask) -> None:
    assert part in ask(evaluate, change)


def test_another_tokenizer_or_template(whole: Path, ask: Ask) -> None:
    base = Path(json.loads((whole / "config.json").read_text())["model"]["path"])
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    settings = json.loads((base / "tokenizer_config.json").read_text())
    before = json.dumps(tokenizer), json.dumps(settings)
    try:
        other = {**settings, "chat_template": settings["chat_template"] + "\n"}
        (base / "tokenizer_config.json").write_text(json.dumps(other))
        assert "chat template is another" in ask(evaluate, lambda config: None, 0)
        vocab = tokenizer["model"]["vocab"]
        vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
        (base / "tokenizer.json").write_text(json.dumps(tokenizer))
        for entry in (evaluate, export):
            assert "tokenizer of the base is another" in ask(entry, lambda config: None)
    finally:
        (base / "tokenizer.json").write_text(before[0])
        (base / "tokenizer_config.json").write_text(before[1])


def test_lines_of_somebody_else_in_the_metrics(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    settings = json.loads((copy / "config.json").read_text())
    config = dpo.get_config(f"model={settings['model']['path']}")
    for name in ("data", "train", "log"):
        config[name].update(settings[name])
    first = train.run(config, str(copy))
    for line in (
        {"step": 1, "split": "train", "loss": "x"},
        {"step": True, "split": "train", "loss": 1},
        {"step": 2, "split": "train", "loss": 1.0},
        {"step": 2, "split": "eval", "loss": {"a": 1}},
    ):
        with (copy / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        assert train.run(config, str(copy)) == first
