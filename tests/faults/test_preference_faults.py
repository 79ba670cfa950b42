"""Pairs and ratings that teach nothing or the wrong thing, as `check` meets them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftjax import check, cli
from tests.cli import Result, run_cli
from tests.faults.commands import (
    QUICK,
    assert_no_run,
    edit_json,
    edit_weights,
    weights,
    write_rows,
)
from tests.tiny import make_tiny_checkpoint

USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
ROW = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
PAIRS = [
    {"prompt": f"Say {i}:", "chosen": f" {i}", "rejected": f" {i + 1}"}
    for i in range(8)
]
Ask = Callable[..., Result]


def flags(model: Path, data: Path, task: str, more: tuple[str, ...]) -> list[str]:
    return [
        f"--config=configs/{task}.py",
        f"--config.model.path={model}",
        f"--config.data.train={data}",
        *QUICK,
        "--config.train.batch_size=4",
        *more,
    ]


@pytest.fixture
def ask(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Ask:
    """`check` on some rows, in this process."""

    def run(rows: list[Any], *more: str, task: str = "dpo") -> Result:
        data = write_rows(tmp_path / "d.jsonl", rows)
        argv = [*flags(tiny, data, task, more), "--json"]
        code = cli.run(check.main, argv, check.define, config=True)
        out, err = capfd.readouterr()
        return Result(code, out, err, None, 0)

    return run


def test_both_sides_of_a_pair_are_shown(ask: Ask) -> None:
    shown = ask(PAIRS, "--rows=1").ok().err
    assert "chosen, d.jsonl:1" in shown and "rejected, d.jsonl:1" in shown
    assert "Say 0:[[ 0<|im_end|>]]" in shown and "Say 0:[[ 1<|im_end|>]]" in shown


def test_sides_that_answer_different_prompts(ask: Ask) -> None:
    other = {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "p"}, BAD]}
    ask([ROW, other]).refused("different prompts", "d.jsonl:2", "on_bad_row=skip")


def test_a_prompt_that_is_none_of_the_messages(ask: Ask) -> None:
    whole = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    told = ask([ROW, {**whole, "prompt": "OTHER"}])
    told.refused("none of the messages", "d.jsonl:2", "OTHER")
    ask([ROW, {**whole, "prompt": USER["content"]}] * 4).ok()


def test_pairs_that_come_twice_and_held_out_ones(ask: Ask, tmp_path: Path) -> None:
    held_out = write_rows(
        tmp_path / "eval.jsonl", [PAIRS[0], {**PAIRS[0], "chosen": "x"}]
    )
    shown = ask([*PAIRS, PAIRS[0]], f"--config.data.eval={held_out}").ok().err
    assert "seen before" in shown and "1 (kept)" in shown
    assert "1 of 2 rows are also in the training data" in shown


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"prompt": [GOOD, USER]}, ("message 0", "`user` must come first")),
        ({"prompt": [USER, USER]}, ("message 1", "`assistant` must come after `user`")),
        ({"prompt": [{**USER, "role": "bot"}]}, ("message 0", "unknown role", "bot")),
        (
            {"prompt": [USER, {**USER, "role": "system"}]},
            ("message 1", "a system message may only be the first"),
        ),
        (
            {"chosen": [GOOD, USER], "rejected": [BAD, USER]},
            ("message 2", "the last message must be the assistant's"),
        ),
        ({"chosen": []}, ("`chosen`", "an empty list")),
        (
            {"prompt": [{**USER, "content": [{"type": "text", "text": "q"}]}]},
            ("message 0", "a list of parts: text only"),
        ),
        (
            {"chosen": [{**GOOD, "tool_calls": [{"name": "f"}]}]},
            ("message 1", "`tool_calls`: text only"),
        ),
        ({"tools": [{"name": "f"}]}, ("`tools`", "text only")),
    ],
)
def test_conversations_out_of_order(
    changes: dict[str, Any], parts: tuple[str, ...], ask: Ask
) -> None:
    ask([ROW, ROW | changes]).refused("d.jsonl:2", *parts)


def test_special_tokens_in_an_answer_are_told(ask: Ask) -> None:
    shown = ask([*PAIRS, {**PAIRS[0], "chosen": " a<|im_end|>b"}]).ok().err
    assert "special tokens, which are encoded as such (first d.jsonl:9)" in shown


@pytest.mark.parametrize("column", ["margin", "score_chosen"])
def test_numbers_that_are_none(column: str, ask: Ask) -> None:
    row = {**PAIRS[0], "score_chosen": 2, "score_rejected": 1, column: float("nan")}
    ask([PAIRS[1], row]).refused("no finite number", f"`{column}`", "d.jsonl:2", "nan")


def test_ties_alone_are_no_data(ask: Ask) -> None:
    ties = [{**row, "score_chosen": 1, "score_rejected": 1} for row in PAIRS]
    ask(ties).refused("nothing is left to train on", "same score: 8 (d.jsonl:1")


def test_answers_that_are_all_good(ask: Ask) -> None:
    good = [{"prompt": r["prompt"], "completion": "x", "label": True} for r in PAIRS]
    ask(good, task="kto").refused("every answer is a good one", "`label` false")


@pytest.mark.parametrize(
    ("task", "flag", "parts"),
    [
        ("dpo", "data.completion_only=False", ("prompts are not", "task=dpo")),
        ("dpo", "loss.beta=0", ("config.loss.beta", "a positive number")),
        ("dpo", "loss.type=sigmod", ("no such loss", "sigmod", "sigmoid")),
        ("dpo", "loss.type_weights=nan", ("config.loss.type_weights", "not all 0")),
        ("dpo", "loss.type_weights=-1", ("config.loss.type_weights", "=-1")),
        ("dpo", "loss.type_weights=0", ("config.loss.type_weights", "not all 0")),
        ("dpo", "loss.type_weights=,1", ("config.loss.type_weights", "=,1")),
        (
            "dpo",
            "loss.precompute=True data.stream=True train.steps=3",
            ("config.data.stream", "a stream has none yet"),
        ),
        (
            "kto",
            "loss.desirable_weight=0 loss.undesirable_weight=0",
            ("desirable_weight", "at least one"),
        ),
        ("kto", "loss.type=kot", ("no such loss", "kot")),
        ("orpo", "loss.nll_scope=prompt", ("config.loss.nll_scope", "'prompt'")),
        ("kto", "parallel=pmap", ("looks at all rows at once", "parallel=pmap")),
        ("orpo", "mesh.fsdp=2 parallel=pmap", ("config.mesh.fsdp", "fsdp=2")),
        ("distill", "loss.nll_weight=2", ("config.loss.nll_weight", "between 0 and 1")),
    ],
)
def test_settings_of_a_loss_that_cannot_be(
    task: str, flag: str, parts: tuple[str, ...], ask: Ask
) -> None:
    rows = PAIRS if task != "distill" else [{"text": "some words"}] * 8
    flags = [f"--config.{part}" for part in flag.split()]
    ask(rows, *flags, task=task).refused(*parts)


def test_a_key_of_another_task() -> None:
    argv = flags(Path("/nowhere"), Path("/nowhere"), "sft", ("--config.loss.beta=0.2",))
    run_cli("check", *argv).refused("no such configuration key", "loss.beta")


@pytest.mark.parametrize("kind", ["vocabulary", "tokenizer"])
def test_a_reference_that_reads_other_tokens(
    kind: str, ask: Ask, tmp_path: Path
) -> None:
    other = make_tiny_checkpoint(tmp_path / "other")
    if kind == "vocabulary":
        names = ("model.embed_tokens.weight", "lm_head.weight")
        wider = {
            name.replace(".", "__"): np.concatenate([weights(other)[name]] * 2)
            for name in names
        }
        size = len(wider["lm_head__weight"])
        edit_weights(other, **wider)
        edit_json(other / "config.json", vocab_size=size)
    else:
        known = json.loads((other / "tokenizer.json").read_text())["model"]
        known["vocab"]["a"], known["vocab"]["b"] = (known["vocab"][x] for x in "ba")
        edit_json(other / "tokenizer.json", model=known)
    told = ("reads other tokens", "ids, tokenizer", str(other))
    ask(PAIRS, f"--config.loss.reference={other}").refused(*told)
    rows = [{"text": "some words"}] * 8
    ask(rows, f"--config.loss.teacher={other}", task="distill").refused(*told)


def test_a_loss_that_is_not_there_leaves_no_run(tiny: Path, tmp_path: Path) -> None:
    data, workdir = write_rows(tmp_path / "d.jsonl", PAIRS), tmp_path / "run"
    more = ("--config.loss.type=kot", f"--workdir={workdir}")
    run_cli("train", *flags(tiny, data, "kto", more)).refused("no such loss")
    assert_no_run(workdir)
