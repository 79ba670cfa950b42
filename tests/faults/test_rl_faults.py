"""What goes wrong in rollouts: rewards, reward models, answers without an end."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ftjax import train
from ftjax.checkpoints.state import Checkpoints
from ftjax.errors import EXIT_DIVERGED, EXIT_USER, UserError
from ftjax.metrics import METRICS, read_rows
from ftjax.rl.rewards import Judge
from tests.faults.commands import copy_model, edit_json, write_rows
from tests.rl.small import config_of, letters, open_small, write_prompts
from tests.runs import make_run

HERE = "tests.faults.test_rl_faults:"


def nothing(completions: Any, **_: Any) -> list[float]:
    return [0.5] * len(completions)


def broken(completions: Any, **_: Any) -> list[float]:
    return [len(text) / 0 for text in completions]


def undefined(completions: Any, **_: Any) -> list[float]:
    return [math.nan, *[1.0] * (len(completions) - 1)]


def too_few(completions: Any, **_: Any) -> list[float]:
    return [1.0]


@pytest.fixture(scope="module")
def prompts(shelf: Path) -> Path:
    return write_prompts(shelf / "prompts.jsonl")


def refused(config: Any, workdir: Path, *parts: str, code: int = EXIT_USER) -> None:
    with pytest.raises(UserError) as error:
        train.run(config, str(workdir))
    screen = error.value.screen()
    assert error.value.code == code, screen
    for part in parts:
        assert part in screen, screen


def test_r29_a_reward_that_fails(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    for name, code, *parts in (
        ("broken", EXIT_USER, "the reward function failed", "ZeroDivisionError"),
        ("too_few", EXIT_USER, "a list of 6 numbers"),
        (
            "undefined",
            EXIT_DIVERGED,
            "no finite number",
            "config.reward.max_nan",
            "nan",
        ),
    ):
        config = config_of("grpo", tiny, prompts, train__sample_rows=0)
        config.reward.function = HERE + name
        refused(config, tmp_path / name, *parts, HERE + name, code=code)


def huge(completions: Any, **_: Any) -> list[float]:
    return [1e20] * len(completions)


def leaves(completions: Any, **_: Any) -> list[float]:
    raise SystemExit(0)


def alone(completions: Any, **_: Any) -> Any:
    return np.array(1.0)


class Odd:
    """Its text fails."""

    def __repr__(self) -> str:
        raise ValueError


class Leaving(BaseException):
    """Of a library that wants to be let through."""


def ragged(completions: Any, **_: Any) -> Any:
    return [[1.0], *[[1.0, 2.0]] * (len(completions) - 1)]


def odd(completions: Any, **_: Any) -> Any:
    return [Odd() for _ in completions]


def times(completions: Any, **_: Any) -> Any:
    return [np.timedelta64(1, "s") for _ in completions]


def away(completions: Any, **_: Any) -> Any:
    raise Leaving(Odd())


def test_r29_a_reward_that_is_no_reward(
    tiny: Path, prompts: Path, tmp_path: Path
) -> None:
    for name, code, part in (
        ("ragged", EXIT_USER, "something else than rewards"),
        ("odd", EXIT_USER, "something else than rewards"),
        ("times", EXIT_USER, "something else than rewards"),
        ("away", EXIT_USER, "Leaving: (its text fails: ValueError)"),
        ("huge", EXIT_DIVERGED, "no finite number"),
        ("leaves", EXIT_USER, "SystemExit"),
        ("alone", EXIT_USER, "a list of 6 numbers"),
    ):
        config = config_of("grpo", tiny, prompts, train__sample_rows=0)
        config.reward.function = HERE + name
        refused(config, tmp_path / name, part, code=code)
    config = config_of("grpo", tiny, prompts, loss__type="foo")
    refused(config, tmp_path / "type", "config.loss.type", "dr_grpo", "foo")
    config = config_of("grpo", tiny, prompts)
    config.reward.function = "nowhere:reward"
    refused(config, tmp_path / "import", "nowhere.py in this folder")
    assert not (tmp_path / "import" / "config.json").exists(), "this is no run yet"


calls = 0


def at_last(completions: Any, **columns: Any) -> list[float]:
    """Fails from the fourth call on: the first is the evaluation before."""
    global calls
    calls += 1
    if calls > 3:
        raise OSError("the grader is away")
    return letters(completions=completions, **columns)


def test_r29_a_reward_that_fails_later_costs_no_step(
    tiny: Path, prompts: Path, tmp_path: Path
) -> None:
    global calls
    config = config_of("grpo", tiny, prompts, train__sample_rows=0)
    config.reward.function = HERE + "at_last"
    calls = 0
    refused(config, tmp_path / "run", "the grader is away")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", report=print)
    assert checkpoints.latest() == 2
    calls = -99
    train.run(config, str(tmp_path / "run"))
    rows = read_rows(tmp_path / "run" / METRICS)
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4]


def test_a_reward_model_that_has_changed(
    tiny: Path, prompts: Path, tmp_path: Path
) -> None:
    judge = make_run(tmp_path / "judge", tiny, task="reward")
    config = config_of("grpo", tiny, prompts, train__sample_rows=0)
    config.reward.function, config.reward.model = "", str(judge)
    train.run(config, str(tmp_path / "run"))
    shutil.rmtree(judge)
    make_run(judge, tiny, task="reward", steps=((20, None),))
    config.train.steps = 6
    refused(config, tmp_path / "run", "belong to another run", "reward_model")


def test_r29_d29_rewards_without_a_signal(
    tiny: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of("grpo", tiny, prompts)
    config.reward.function = HERE + "nothing"
    game, trained, _ = open_small(config)
    for number in range(2):
        rows = game.rollout(number, trained)
        assert rows["metric/frac_reward_zero_std"].all()
        assert not rows["advantage"].any()
    assert capsys.readouterr().err.count("there is no signal") == 1
    with config.unlocked():
        config.reward.function, config.reward.max_nan = HERE + "undefined", 0.2
    game, trained, _ = open_small(config)
    rows = game.rollout(0, trained)
    assert rows["metric/frac_reward_nan"].tolist() == [1.0] + [0.0] * 7
    assert not rows["weights"][0].any() and rows["weights"][1:].any(1).all()


def test_r29_the_policy_runs_away(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    config = config_of(
        "grpo",
        tiny,
        prompts,
        loss__max_kl=1e-3,
        optim__lr=1.0,
        train__sample_rows=0,
    )
    parts = ("too far from its reference", "config.loss.max_kl", "0.001")
    refused(config, tmp_path / "run", *parts, code=EXIT_DIVERGED)
    steps = [row["step"] for row in read_rows(tmp_path / "run" / METRICS)]
    assert max(steps) < 4


def test_r29_r30_answers_without_an_end_and_without_words(
    tiny: Path, prompts: Path, shelf: Path
) -> None:
    """Bounded, counted, and left out where that is asked for."""
    config = config_of("grpo", tiny, prompts, loss__mask_truncated=True)
    game, trained, _ = open_small(config)
    rows = game.rollout(0, trained)
    assert rows["metric/completions/mean_length"].tolist() == [8.0] * 8
    assert rows["metric/completions/clipped_ratio"].all()
    assert not rows["weights"].any()
    # Every token ends the text: what is left are answers without words.
    quiet = copy_model(tiny, shelf / "quiet")
    edit_json(quiet / "generation_config.json", eos_token_id=list(range(260)))
    config = config_of("grpo", quiet, prompts, rollout__max_new_tokens=8)
    game, trained, _ = open_small(config)
    rows = game.rollout(0, trained)
    ended = rows["metric/completions/clipped_ratio"] == 0
    lengths = rows["metric/completions/mean_length"]
    assert ended.any() and (lengths[ended] == 1).all()


def test_c14_a_reward_model_with_other_tokens(
    tiny: Path, prompts: Path, shelf: Path, tmp_path: Path
) -> None:
    config = config_of("grpo", tiny, prompts)
    config.reward.model = str(make_run(tmp_path / "sft", tiny))
    refused(config, tmp_path / "a", "no head that gives rewards", "a run of sft")
    other = copy_model(tiny, shelf / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    judge = make_run(tmp_path / "judge", other)
    edit_json(judge / "config.json", task="reward")
    config.reward.model = str(judge)
    refused(config, tmp_path / "b", "other tokens than the policy", "ids, tokenizer")


def greedy(prompts: Any, completions: Any, answers: Any, **_: Any) -> list[float]:
    """Changes all that it is given, and tells how much there was."""
    found = [float(len(p) + len(a)) for p, a in zip(prompts, answers, strict=True)]
    for given in (*prompts, *answers, prompts, completions, answers):
        given.clear()
    return found


def test_a_reward_that_changes_what_it_is_given_changes_nothing() -> None:
    config = SimpleNamespace(
        function=HERE + "greedy", model="", weights="", unfinished=0.0, max_nan=0.0
    )
    judge = Judge(config)
    turns = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": turns, "answers": ["a", "b"]}] * 2  # the same objects twice
    for _ in range(2):
        judged = judge(rows, ["x", "y"], [[1], [1]], [[2], [3]], [True, True])
        assert judged.total.tolist() == [3.0, 3.0]


def test_rows_and_settings_that_do_not_fit(
    tiny: Path, prompts: Path, tmp_path: Path
) -> None:
    for values, parts in (
        ({"rollout__group": 1}, ("config.rollout.group", "2 or more")),
        ({"rollout__group": 3}, ("whole groups", "--config.train.batch_size=9")),
        ({"rollout__passes": 2, "train__steps": 5}, ("config.train.steps", "=6")),
        ({"rollout__passes": 3}, ("between rollouts", "a multiple of", "=6")),
        ({"rollout__max_new_tokens": 64}, ("no room for a prompt",)),
        ({"loss__temperature": 0.0}, ("config.loss.temperature",)),
    ):
        config = config_of("grpo", tiny, prompts, **values)
        refused(config, tmp_path / "run", *parts)
    for row, part in (
        ({"text": "a"}, "needs prompts to answer"),
        ({"prompt": 3}, "column `prompt` has the wrong type"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "out of order"),
    ):
        data = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}, row])
        config = config_of("grpo", tiny, data)
        refused(config, tmp_path / "run", part, "bad.jsonl:2")
