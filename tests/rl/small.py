"""Small runs that learn from rewards, in the process of the test."""

import json
from pathlib import Path
from typing import Any

from configs import grpo, ppo
from ftjax.prepare import load_variables, prepare
from ftjax.rl.rollouts import Rollouts
from ftjax.rl.setup import open_rollouts

PROMPTS = ["the thing in", "on", "a re er on the", "What is it?", "in the end", "er"]
CONFIGS = {"grpo": grpo, "ppo": ppo}


def write_prompts(path: Path) -> Path:
    rows = [{"prompt": text, "goal": i} for i, text in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def letters(
    prompts: list[str], completions: list[str], goal: list[int], **columns: Any
) -> list[float]:
    """How many of the answer's letters are among the first of the alphabet."""
    del prompts, columns
    cut = (chr(ord("g") + g % 3) for g in goal)
    return [
        sum(c <= last for c in text.lower()) / max(len(text), 1)
        for last, text in zip(cut, completions, strict=True)
    ]


def config_of(task: str, model: Path, data: Path, **values: Any) -> Any:
    """A config of a few short steps; `values` have '__' for '.'."""
    c = CONFIGS[task].get_config(f"model={model}")
    c.method.rank = 4
    c.data.train, c.data.eval = str(data), str(data)
    c.data.max_length = 64
    c.optim.lr, c.optim.warmup, c.optim.schedule = 1e-2, 0, "constant"
    c.train.update({"steps": 4, "batch_size": 8, "eval_every": 0, "sample_rows": 2})
    c.train.save_every = 4
    c.rollout.update({"group": 4, "max_new_tokens": 8, "passes": 1})
    c.reward.function = "tests.rl.small:letters"
    c.log.tensorboard = False
    for name, value in values.items():
        section, _, key = name.partition("__")
        c[section][key] = value
    return c


def open_small(config: Any) -> tuple[Rollouts, Any, Any]:
    """(rollouts, trained, frozen) of a config, before its first step."""
    ready = prepare(config)
    trained, frozen, _ = load_variables(config, ready.base, ready.shape, ready.mesh)
    game = open_rollouts(config, ready, frozen)
    assert game is not None
    return game, trained, frozen
