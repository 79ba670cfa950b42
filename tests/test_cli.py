"""Flags and configurations: every mistake is one screen that says what was meant."""

import json
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from ftjax import cli
from ftjax.errors import UserError

CONFIG = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

def get_config(arg=""):
    c = ConfigDict({"optim": {"lr": 1e-3, "name": "adamw"}, "shuffle": True})
    c.arg = arg
    c.steps = placeholder(int)
    return c
"""


def define(args: flags.FlagValues) -> None:
    cli.define_source(args)
    flags.DEFINE_integer("count", 3, "how many", lower_bound=1, flag_values=args)


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(CONFIG)
    return f"--config={tmp_path / 'mine.py'}"


def refused(argv: list[str], *parts: str) -> None:
    with pytest.raises(UserError) as error:
        cli.parse(argv, define, config=True)
    screen = error.value.screen()
    assert error.value.code == 2
    for part in parts:
        assert part in screen, screen


def test_values_and_their_kinds(config: str) -> None:
    keys = ["--config.optim.lr=2", "--config.steps=7", "--noconfig.shuffle"]
    args = cli.parse([*keys, f"{config}:a=b", "--count=5"], define, config=True)
    assert args is not None
    assert args.config.to_dict() == {
        "optim": {"lr": 2.0, "name": "adamw"},
        "shuffle": False,
        "arg": "a=b",
        "steps": 7,
    }
    assert args.config.is_locked
    assert (args.count, args.json, args.model) == (5, False, "")


def test_no_configuration_is_none() -> None:
    args = cli.parse([], define, config=True)
    assert args is not None
    assert args.config is None


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--config.optim.lrr=1", ["optim.lrr", "did you mean optim.lr"]),
        ("--config.optimm.lr=1", ["optimm.lr", "did you mean optim.lr"]),
        ("--config.lr=1", ["did you mean optim.lr"]),
        ("--config.optim=1", ["no such configuration key"]),
        ("--config.optim.lr=abc", ["--config.optim.lr", "float", "'abc'", "0.001"]),
        ("--config.steps=1.5", ["--config.steps", "int", "'1.5'"]),
        ("--config.shuffle=maybe", ["--config.shuffle", "bool", "'maybe'"]),
        ("--count=0", ["--count", "0 is not a positive integer"]),
        ("--cuont=1", ["--cuont", "did you mean --count"]),
        ("--weights=worst", ["--weights", "auto|best|last"]),
        ("stray", ["no flag", "stray"]),
    ],
)
def test_mistyped(flag: str, parts: list[str], config: str) -> None:
    refused([config, flag], *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("def get_config(:\n", ["syntax error", "mine.py:1"]),
        ("\nraise ValueError('boo')\n", ["ValueError: boo", "mine.py:2"]),
        ("def get_config():\n    return 1 / 0\n", ["ZeroDivision", "mine.py:2"]),
        ("import no_such_module\n", ["no_such_module", "mine.py:1"]),
        ("x = 1\n", ["no get_config()", "mine.py"]),
        ("def get_config():\n    return None\n", ["ConfigDict", "NoneType"]),
    ],
)
def test_broken_configurations(text: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    refused([f"--config={tmp_path / 'mine.py'}"], *parts)


def test_missing_configurations(config: str, tmp_path: Path) -> None:
    refused([f"--config={tmp_path / 'mien.py'}"], "did you mean", "mine.py")
    refused(["--config.steps=1"], "without a configuration")
    refused([config, config], "twice")
    refused(["--config"], "names no file")


def test_json_is_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main(args: flags.FlagValues) -> dict[str, Any]:
        print("on the way")
        return {"count": args.count}

    assert cli.run(main, ["--json"], define) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"count": 3}
    assert "on the way" in err
    assert cli.run(main, [], define) == 0
    assert capsys.readouterr().out == "on the way\n"


def test_help_names_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    def main(args: flags.FlagValues) -> None:
        raise AssertionError

    assert cli.run(main, ["--help"], define, config=True) == 0
    out = capsys.readouterr().out
    assert "--count: how many [3]" in out
    assert "--config=FILE.py" in out
