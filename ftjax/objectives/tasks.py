"""The tasks: which rows each reads, what it trains beside a method, and its objective.

A new objective is a file beside this one and a line of `TASKS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftjax.errors import UserError
from ftjax.methods.heads import with_head
from ftjax.methods.method import plan_method
from ftjax.methods.parts import Method
from ftjax.models.decoder import Decoder
from ftjax.objectives.causal import causal
from ftjax.objectives.cpo import cpo
from ftjax.objectives.distill import distilled
from ftjax.objectives.dpo import dpo, pair_logps
from ftjax.objectives.grpo import grpo
from ftjax.objectives.kto import rated, rated_logps
from ftjax.objectives.orpo import WHOLE, orpo
from ftjax.objectives.ppo import VALUE, ppo
from ftjax.objectives.reward import HEAD, reward_model
from ftjax.step import Objective
from ftjax.weights import Array

PyTree = Any


@dataclass(frozen=True)
class Task:
    """An objective and what it needs.

    Attributes:
      make: (model, `config.loss`) -> the objective.
      reads: the kind of rows; see `data.groups`.
      reference: (model, variables, batch, `config.loss`) -> what a reference model says
        of each group, float32 [B, U, 2]; None where the objective needs none.
      guided: in place of `make`, where there is a teacher: its model is the second.
      head: the collection of a scalar head that it trains, if it does.
      ends: rows hold the last token of a sequence too, where a head reads it.
      shares: its losses read answers alone, so that their prompt may stand once.
      shown: metrics that tell most beside the loss, for people.
    """

    make: Callable[[Decoder, Any], Objective]
    reads: str = "answers"
    reference: Callable[[Decoder, PyTree, PyTree, Any], Array] | None = None
    guided: Callable[[Decoder, Decoder, Any], Objective] | None = None
    head: str = ""
    ends: bool = False
    shares: bool = False
    shown: tuple[str, ...] = ()

    @property
    def logits(self) -> bool:
        """It reads the model's logits, as all do but a reward model."""
        return self.head != HEAD

    @property
    def online(self) -> bool:
        """It learns from its own answers; see `rl.rollouts`."""
        return self.reads == "prompts"


def _causal(model: Decoder, config: Any) -> Objective:
    # Runs and tasks without a setting do not have what it sets.
    return causal(
        model,
        config.chunk,
        kind=getattr(config, "type", "nll"),
        label_smoothing=getattr(config, "label_smoothing", 0.0),
        neftune_alpha=getattr(config, "neftune_alpha", 0.0),
    )


LIKELIHOOD = ("perplexity", "token_accuracy")
LENGTHS, PPO_KL = ("completions/mean_length",), "objective/kl"
PREFERENCE = ("rewards/accuracies_fair", "rewards/margins")

TASKS: dict[str, Task] = {
    "sft": Task(_causal, shown=LIKELIHOOD),
    "generic": Task(_causal, shown=(*LIKELIHOOD, "bits_per_byte")),
    "reward": Task(
        reward_model,
        "pairs",
        head=HEAD,
        ends=True,
        shown=("accuracy_fair", "margin"),
    ),
    "dpo": Task(dpo, "pairs", reference=pair_logps, shares=True, shown=PREFERENCE),
    "orpo": Task(orpo, "mixed", shares=True, shown=("nll", *PREFERENCE)),
    "kto": Task(
        rated,
        "rated",
        reference=rated_logps,
        shares=True,
        shown=("kl", "rewards/chosen", "rewards/rejected"),
    ),
    "cpo": Task(cpo, "pairs", shares=True, shown=("nll", *PREFERENCE)),
    "simpo": Task(cpo, "pairs", shares=True, shown=PREFERENCE),
    "distill": Task(_causal, guided=distilled, shown=("nll", "token_accuracy")),
    "grpo": Task(grpo, "prompts", shown=("reward", "kl", *LENGTHS)),
    "ppo": Task(ppo, "prompts", head=VALUE, shown=("reward", PPO_KL, *LENGTHS)),
}


def plan_task(model: Decoder, task: str, config: Any) -> Method:
    """The method of a config, `config.method`, and the head that the task trains.

    Raises:
      UserError: as `plan_method`, or there is no such task.
    """
    method, head = plan_method(model, config), task_of(task).head
    return with_head(method, model.spec.d_model, head) if head else method


def check_sharing(config: Any) -> None:
    """Whether `data.share_prompt` may be asked for: only where no prompt is trained on.

    Raises:
      UserError: it is, in this task or with these settings.
    """
    if not config.data.share_prompt:
        return
    got = ""
    if not task_of(config.task).shares:
        got = f"task={config.task}"
    elif config.loss.get("nll_scope") == WHOLE:
        got = f"loss.nll_scope={WHOLE}"
    elif not config.data.completion_only:
        got = "data.completion_only=False"
    if got:
        tasks = ", ".join(name for name, task in TASKS.items() if task.shares)
        raise UserError(
            "a prompt that is read once for both answers is not trained on",
            where="config.data.share_prompt",
            expected=f"one of {tasks}, trained on answers alone",
            got=got,
            fix="--config.data.share_prompt=False",
        )


def task_of(name: str) -> Task:
    """The task of a config, `config.task`.

    Raises:
      UserError: there is no such task.
    """
    if name in TASKS:
        return TASKS[name]
    raise UserError(
        "there is no such task",
        where="config.task",
        expected=", ".join(TASKS),
        got=repr(name),
        fix="begin with a file of configs/",
    )
