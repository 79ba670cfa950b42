"""The runs of the experiment: a task, its settings, and what is measured of it.

Two sets: `ships` is the shipped base on the shipped data; `stories` is a small
pretrained model (stories260K) on stories, read from a folder beside the repository.
"""

import importlib
import inspect
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[3] / "shared"
PAIRS = "preference/tinystories_continuation"
SETS = ("ships", "stories")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      task: the name of a file of configs/.
      metric: what is to change on the held-out rows.
      more: 1 where it should rise, -1 where it should fall.
      chance: what it is where nothing is learned, of a share; else None.
      values: beside what all runs of the set have.
      judge: the run whose reward model judges its answers; none: a function does.
    """

    task: str
    metric: str
    more: int
    chance: float | None = None
    values: dict[str, Any] = field(default_factory=dict)
    judge: str = ""


# ORPO whose odds ratio has no weight is SFT on the chosen answers: both log the same.
NOTHING = 1e-9
RUNS: dict[str, Run] = {
    "GT": Run("generic", "perplexity", -1),
    "SFT": Run("sft", "loss", -1),
    "reward model": Run("reward", "accuracy_fair", 1, 0.5),
    "DPO": Run("dpo", "rewards/accuracies_fair", 1, 0.5),
    "KTO": Run("kto", "loss", -1),
    "SimPO": Run("simpo", "rewards/margins", 1),
    "SFT on chosen": Run(
        "orpo",
        "logps/rejected",
        1,
        values={"loss.beta": NOTHING, "loss.nll_scope": "chosen"},
    ),
    "ORPO": Run(
        "orpo",
        "log_odds_chosen",
        1,
        values={"loss.beta": 1.0, "loss.nll_scope": "chosen"},
    ),
}
WORDS = {"reward.function": "words", "reward.words": "happy,friend"}
ONLINE = {
    "rollout.max_new_tokens": 32,
    "train.batch_size": 32,
    "train.log_every": 1,
    "data.eval_rows": 64,
}
RUNS |= {
    "GRPO": Run("grpo", "reward", 1, values={"loss.beta": 0.02, **ONLINE}),
    "GRPO, more beta": Run("grpo", "reward", 1, values={"loss.beta": 1.0, **ONLINE}),
    "PPO": Run("ppo", "reward", 1, values={"rollout.passes": 2, **ONLINE}),
}
RUNS |= {
    f"{name}, reward model": replace(RUNS[name], judge="reward model")
    for name in ("GRPO", "PPO")
}
CODE = {
    "train": ("argparse", "ast", "difflib", "inspect", "pathlib", "tarfile", "typing"),
    "eval": ("heapq", "shutil", "textwrap", "zipfile"),
}
BETWEEN = "\\n\\n\\n"  # of the definitions of a module: two blank lines
RATES = {"generic": 1e-3, "sft": 1e-3, "simpo": 3e-4, "grpo": 1e-3, "ppo": 1e-3}
USUAL_RATE = 5e-4


def folder_of(name: str, out: Path) -> Path:
    """The folder of a run in that of all."""
    return out / name.replace(" ", "-").replace(",", "").lower()


def settings(name: str, on: str, steps: int, out: Path) -> dict[str, Any]:
    """What a run sets beside its config.

    Args:
      name: of RUNS.
      on: of SETS.
      steps: of the run.
      out: the folder of all runs.
    """
    run = RUNS[name]
    values: dict[str, Any] = {
        "optim.lr": RATES.get(run.task, USUAL_RATE),
        "train.steps": steps,
        "train.batch_size": 4,
        "train.eval_every": max(steps // 4, 1),
        "train.save_every": steps,
        "train.sample_rows": 0,
        "train.log_every": steps,
        "data.max_length": 256,
        "data.eval_rows": 200,
        "log.tensorboard": False,
    }
    if on == "stories":
        values |= stories(run.task)
        values |= WORDS if run.task in ("grpo", "ppo") else {}
    elif run.task == "generic":
        values |= code(out)
    if run.judge:
        judge = folder_of(run.judge, out).resolve()
        values |= {"reward.function": "", "reward.model": str(judge)}
    return values | run.values


def stories(task: str) -> dict[str, Any]:
    """The data of a task, for the model of stories."""
    data = SHARED / "data"
    pairs = (f"{PAIRS}_train.jsonl.gz", f"{PAIRS}_eval.jsonl")
    files = {
        "generic": ("text/tinyshakespeare_train.txt", "text/tinyshakespeare_eval.txt"),
        "sft": (
            "sft/tinystories_continue_train.jsonl",
            "sft/tinystories_continue_eval.jsonl",
        ),
    }
    train, held_out = files.get(task, pairs)
    return {"data.train": str(data / train), "data.eval": str(data / held_out)}


def code(out: Path) -> dict[str, Any]:
    """Data that is new to the shipped base: what `write_code` writes."""
    files = {f"data.{split}": str(code_file(out, split).resolve()) for split in CODE}
    return {"data.separator": BETWEEN, **files}


def code_file(out: Path, split: str) -> Path:
    return out / f"code_{split}.txt"


def write_code(out: Path) -> None:
    """Sources of the standard library as text, a document for each definition."""
    out.mkdir(parents=True, exist_ok=True)
    for split, names in CODE.items():
        sources = [inspect.getsource(importlib.import_module(name)) for name in names]
        code_file(out, split).write_text("\n\n\n".join(sources), encoding="utf-8")


def model_of(on: str) -> str:
    return "base" if on == "ships" else str(SHARED / "models" / "stories260K")


def config(name: str, on: str, steps: int, out: Path) -> Any:
    """The config of one run; see `settings`."""
    module = importlib.import_module(f"configs.{RUNS[name].task}")
    made = module.get_config(f"model={model_of(on)},method=lora")
    made.update_from_flattened_dict(settings(name, on, steps, out))
    return made
