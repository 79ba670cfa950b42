"""Whole runs that learn from rewards: they learn, continue to the same bits, and use
a reward model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import reward
from ftjax import cli, evaluate, export, train
from ftjax.metrics import METRICS, SAMPLES, read_rows
from ftjax.prepare import prepare
from ftjax.rl.answers import lay_out
from ftjax.rl.reward_model import RewardModel, turn_end
from ftjax.rl.rewards import told
from tests.faults.commands import write_rows
from tests.rl.small import config_of, write_prompts

TIMES = ("time", "tokens_per_s")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("rl") / "prompts.jsonl")


def history(workdir: Path) -> list[dict[str, Any]]:
    rows = read_rows(workdir / METRICS)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def test_a_run_raises_its_reward(
    tiny_llama: Path, prompts: Path, tmp_path: Path
) -> None:
    config = config_of(
        "grpo",
        tiny_llama,
        prompts,
        train__steps=16,
        train__save_every=16,
        train__batch_size=16,
        optim__lr=5e-2,
    )
    found = train.run(config, str(tmp_path / "run"))
    rows = [row for row in history(tmp_path / "run") if row["split"] == "train"]
    rewards = [row["reward"] for row in rows]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.1
    assert found["eval"]["reward"] == -found["eval"]["loss"]
    names = {"reward_std", "frac_reward_zero_std", "entropy", "clip_ratio/region"}
    names |= {f"completions/{x}" for x in ("clipped_ratio", "min_length", "max_length")}
    assert names <= rows[0].keys() and "kl" not in rows[0]
    told = read_rows(tmp_path / "run" / SAMPLES)
    assert len(told) == 4 and all("reward" in row for row in told)
    assert "reward" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("task", ["grpo", "ppo"])
def test_a_longer_run_continues_to_the_same_arrays(
    task: str, tiny_llama: Path, prompts: Path, tmp_path: Path
) -> None:
    """Two rollouts of two steps at once, and one and one: equal to the last bit."""

    def run(name: str, steps: int) -> None:
        config = config_of(
            task,
            tiny_llama,
            prompts,
            train__steps=steps,
            train__save_every=2,
            train__eval_every=2,
            rollout__passes=2,
            loss__beta=0.05,
        )
        train.run(config, str(tmp_path / name))

    run("straight", 4)
    run("parts", 2)
    run("parts", 4)
    assert history(tmp_path / "parts") == history(tmp_path / "straight")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (
        tmp_path / "straight" / name
    ).read_bytes()


def test_a_reward_model_judges_what_it_has_learned(
    tiny_llama: Path, prompts: Path, tmp_path: Path
) -> None:
    def says(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    pairs = write_rows(
        tmp_path / "pairs.jsonl",
        [
            {
                "prompt": says("user", f"Say {i}."),
                "chosen": says("assistant", f"Yes {i}."),
                "rejected": says("assistant", f"No {i}."),
            }
            for i in range(16)
        ],
    )
    judged = reward.get_config(f"model={tiny_llama}")
    judged.data.update({"train": str(pairs), "max_length": 64, "eval": ""})
    judged.optim.update({"lr": 2e-2, "warmup": 0})
    judged.train.update({"steps": 8, "batch_size": 4})
    judged.log.tensorboard = False
    train.run(judged, str(tmp_path / "judge"))

    config = config_of("grpo", tiny_llama, prompts)
    # Whatever reward is usual: where a model judges, no other.
    config.reward.model, config.reward.function = str(tmp_path / "judge"), "auto"
    assert told(config.reward) == f"reward: 1 x the reward model {tmp_path / 'judge'}"
    ready = prepare(config)
    how = {"length": 64, "rows": 3, "dtype": ready.shape.dtype, "mesh": ready.mesh}
    model = RewardModel(config.reward.model, ready.base, **how)
    tokenizer, columns, asked, answers = ready.base.tokenizer, [], [], []
    for i in range(5):
        prompt = says("user", f"Say {20 + i}.")
        columns.append({"prompt": prompt})
        asked.append(tokenizer.encode_chat(prompt))
        text = f"{'Yes' if i % 2 else 'No'} {20 + i}.<|im_end|>"
        answers.append(tokenizer.encode([text], add_special=False)[0])
    found = model(columns, asked, answers, [True] * 5)
    assert found[1::2].min() > found[::2].max()
    # And so does the model that it is written as.
    wide = ["--to=merged", f"--out={tmp_path / 'whole'}", "--dtype=float32"]
    argv = [f"--workdir={config.reward.model}", *wide]
    assert cli.run(export.main, argv, export.define) == 0
    merged = RewardModel(str(tmp_path / "whole"), ready.base, **how)
    again = merged(columns, asked, answers, [True] * 5)
    np.testing.assert_allclose(again, found, atol=1e-5)
    # As in training: behind the end of the turn comes what the template writes there.
    assert tokenizer.decode(turn_end(tokenizer)) == "\n"
    whole = tokenizer.render(
        [*columns[0]["prompt"], *says("assistant", "No 20.")], False
    )
    ids = tokenizer.encode([whole], add_special=False)[0]
    laid = lay_out(asked[:1], [[*answers[0], *turn_end(tokenizer)]], 64)
    assert laid["tokens"][0, : len(ids)].tolist() == ids
    train.run(config, str(tmp_path / "run"))
    row = history(tmp_path / "run")[-2]
    assert row["rewards/model/mean"] == pytest.approx(row["reward"])
    # The command takes over the run's judge, its lengths and its way to answer.
    argv = [f"--workdir={tmp_path / 'run'}", f"--data={prompts}", "--json"]
    args = cli.parse(argv, evaluate.define, config=True)
    assert args is not None
    said = evaluate.main(args)
    last = [row for row in history(tmp_path / "run") if row["split"] == "eval"][-1]
    assert said["reward"] == pytest.approx(last["reward"], rel=1e-5)
    assert said["rows"] == 6 and said["task"] == "grpo"
