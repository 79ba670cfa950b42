"""Configurations that cannot be meant, refused before JAX starts or a row is read."""

from pathlib import Path

import pytest

from tests.cli import run_cli
from tests.faults.commands import (
    assert_no_run,
    check,
    contents,
    copy_model,
    edit_json,
    options,
)

NO_MODEL = "/nowhere"  # a mistyped value is found before the model is looked for


def test_an_unknown_key(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    flags = options(NO_MODEL, NO_MODEL, "--config.optim.lrr=1", f"--workdir={workdir}")
    run_cli("train", *flags).refused(
        "no such configuration key", "--config.optim.lrr", "did you mean optim.lr"
    )
    assert not workdir.exists()


def test_an_unknown_flag() -> None:
    run_cli("check", "--confg=configs/sft.py").refused("--confg", "--config")


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("optim.lr=abc", ("config.optim.lr", "expected: float", "'abc'")),
        ("train.steps=-5", ("config.train.steps", "1 or more", "-5")),
        ("optim.lr=nan", ("config.optim.lr", "a positive number", "nan")),
        ("train.batch_size=0", ("config.train.batch_size", "1 or more", "0")),
        ("optim.schedule=square", ("config.optim.schedule", "cosine", "'square'")),
        ("method.rank=0", ("config.method.rank", "1 or more", "0")),
        ("method.alpha=0", ("config.method.alpha", "a positive number", "0")),
        ("method.dropout=1.5", ("config.method.dropout", "below 1", "1.5")),
        ("model.dtype=float16", ("config.model.dtype", "bfloat16", "'float16'")),
        ("model.param_dtype=float64", ("config.model.param_dtype", "'float64'")),
        ("method.dtype=float16", ("config.method.dtype", "bfloat16", "'float16'")),
        (f"train.batch_size={10**30}", ("1 or more, at most 2,147,483,647",)),
        (f"seed={10**30}", ("config.seed", "at most 2,147,483,647")),
        (f"method.rank={10**30}", ("config.method.rank", "at most 2,147,483,647")),
        ("optim.lr=1e300", ("config.optim.lr", "at most 1e+30", "1e+300")),
        (
            "train.epochs=1",
            ("given twice", "config.train.steps, config.train.epochs", "steps=2"),
        ),
        (
            "train.accumulate=3",
            ("equal micro-batches", "2 / 3", "batch_size=3 or 6"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_cannot_be(flag: str, parts: tuple[str, ...]) -> None:
    check(NO_MODEL, NO_MODEL, f"--config.{flag}").refused(*parts)


def test_a_rank_for_full_fine_tuning() -> None:
    check(NO_MODEL, NO_MODEL, "--config.method.rank=8", method="full").refused(
        "--config.method.rank", "method.name='full', which has no `rank`"
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ("no such configuration file", "mine.py")),
        ("import os\ndef get_config(:\n", ("syntax error", "mine.py:2")),
        (
            "def get_config():\n    c = {}\n    return c['model']\n",
            ("the configuration raised KeyError", "mine.py:3", "return c['model']"),
        ),
        ("config = 1\n", ("has no get_config()", "mine.py")),
    ],
    ids=["missing", "syntax", "raises", "no-function"],
)
def test_a_configuration_file_that_cannot_be_run(
    text: str | None, parts: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    workdir = tmp_path / "run"
    run_cli("train", f"--config={file}", f"--workdir={workdir}").refused(*parts)
    assert not workdir.exists()


def test_a_rank_that_is_larger_than_a_weight(tiny: Path, pairs: Path) -> None:
    check(tiny, pairs, "--config.method.rank=65").refused(
        "the rank is larger than the weight", "at most", "64 x", "65"
    )


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        (
            "q_proj,q_projj",
            ("q_proj (2 matches), q_projj (0 matches)", "did you mean q_proj"),
        ),
        ("norm", ("norm (0 matches)", "norms and embeddings cannot be targets")),
        ("embed_tokens", ("embed_tokens (0 matches)", "norms and embeddings")),
        ("q_proj(", ("not a regular expression", "q_proj(")),
        (",", ("there is nothing to train", "config.method.targets", "all-linear")),
        ("lm_head", ("the output head cannot be a LoRA target", "lm_head")),
    ],
    ids=["misspelt", "norm", "embedding", "regex", "none", "head"],
)
def test_targets_that_match_nothing(
    targets: str, parts: tuple[str, ...], tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    flag = f"--config.method.targets={targets}"
    check(tiny, pairs, flag).refused("config.method.targets", *parts)


def test_a_pattern_of_ranks_that_matches_nothing(tiny: Path, pairs: Path) -> None:
    check(tiny, pairs, "--config.method.rank_pattern=k_prj=4").refused(
        "config.method.rank_pattern", "k_prj (0 matches)", "k_proj"
    )


def test_rows_longer_than_the_positions(tiny: Path, pairs: Path) -> None:
    check(tiny, pairs, "--config.data.max_length=513").refused(
        "config.data.max_length", "at most 512", "513"
    )


def test_a_directory_with_another_run(
    finished: Path, tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    workdir = copy_model(finished, tmp_path / "run")
    before = contents(workdir)
    flags = options(
        tiny,
        pairs,
        "--config.optim.lr=0.5",
        "--config.method.rank=4",
        "--config.seed=7",
    )
    run_cli("train", *flags, f"--workdir={workdir}").refused(
        "another configuration",
        "method.rank: 16 -> 4",
        "optim.lr: 0.01 -> 0.5",
        "seed: 0 -> 7",
        "train.steps",
    )
    after = contents(workdir)
    after.pop("error.txt")
    assert after == before


def test_a_saved_configuration_with_an_unknown_key(
    finished: Path, tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    workdir = copy_model(finished, tmp_path / "run")
    edit_json(workdir / "config.json", sed=3)
    flags = options(tiny, pairs, "--config.optim.lr=0.01", f"--workdir={workdir}")
    run_cli("train", *flags).refused("sed: 3 -> (not set)")


def test_a_refused_run_leaves_no_run(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    flag = "--config.method.targets=q_projj"
    run_cli("train", *options(tiny, pairs, flag, f"--workdir={workdir}")).refused(
        "q_projj"
    )
    assert_no_run(workdir)
