"""A trained reward model as a judge: a run of `configs/reward.py`, or a model folder.

It reads the very tokens that the policy read and wrote, so both must have the same
tokenizer. Behind the end of an assistant's turn comes what the chat template writes
there, as in the rows that the reward model learned from.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ftjax.data.encode import Example, encode
from ftjax.data.loader import MULTIPLE
from ftjax.data.schema import Conversation
from ftjax.data.tokenizer import Tokenizer
from ftjax.errors import UserError
from ftjax.loading import Base, open_base, require_same_tokens
from ftjax.objectives.reward import HEAD, scores
from ftjax.objectives.tasks import task_of
from ftjax.policy import base_of_run, open_policy
from ftjax.rl.answers import lay_out
from ftjax.rl.rewards import Columns
from ftjax.run_folder import is_run_folder, read_run_config, run_hash
from ftjax.sharding import batch_sharding, put_batch

WHERE = "config.reward.model"


class RewardModel:
    """Scores of answers, on the device.

    Args:
      source: the folder of a run, or of a model with one label (or its Hub name).
      base: of the policy.
      length: tokens that a prompt and its answer may have.
      rows: that are scored at a time.
      dtype: of the weights and the computation.
      mesh: where they live.

    Raises:
      UserError: no reward model, one with other tokens, or one whose context is too
        short.
    """

    def __init__(
        self, source: str, base: Base, *, length: int, rows: int, dtype: Any, mesh: Mesh
    ):
        require_same_tokens(base, _open(source), "reward model", WHERE)
        is_run = is_run_folder(source)
        self.policy = open_policy(
            workdir=source if is_run else "",
            model="" if is_run else source,
            dtype=dtype,
            mesh=mesh,
        )
        self.tail = turn_end(self.policy.base.tokenizer)
        self.length = -(-(length + len(self.tail)) // MULTIPLE) * MULTIPLE
        if length + len(self.tail) > self.policy.max_positions:
            raise UserError(
                "answers may be longer than the reward model's context",
                where=f"{WHERE}, config.rollout.max_new_tokens",
                expected=f"at most {self.policy.max_positions} tokens with the prompt",
                got=str(length + len(self.tail)),
                fix="lower config.rollout.max_new_tokens or config.data.max_length "
                "(of ftjax.evaluate: --max_length)",
            )
        self.rows = -(-rows // mesh.size) * mesh.size
        self.sharding = batch_sharding(mesh)
        model = self.policy.model

        def score(variables: Any, batch: Any) -> jax.Array:
            return scores(model, variables, batch, members=1)[0, :, 0]

        self._score = jax.jit(score)

    def __call__(
        self,
        columns: Sequence[Columns],
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        stopped: Sequence[bool],
    ) -> np.ndarray:
        """The score of each answer, float32 [n]."""
        ended = [
            [*answer, *self.tail]
            if stop and not isinstance(row["prompt"], str)
            else answer
            for row, answer, stop in zip(columns, answers, stopped, strict=True)
        ]
        found = []
        for start in range(0, len(ended), self.rows):
            # The last call is as large as the others, so that nothing compiles again.
            chosen = [min(i, len(ended) - 1) for i in range(start, start + self.rows)]
            batch = lay_out(
                [prompts[i] for i in chosen], [ended[i] for i in chosen], self.length
            )
            batch["pair"] = np.ones((len(chosen), 1), np.float32)
            sent = put_batch(batch, self.sharding)
            found.append(np.asarray(self._score(self.policy.variables, sent)))
        return np.concatenate(found)[: len(ended)]


def turn_end(tokenizer: Tokenizer) -> list[int]:
    """What the chat template writes behind the end of an assistant's turn."""
    if tokenizer.template is None:
        return []
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    made = encode(Conversation(turns, "the chat template"), tokenizer, max_length=10**6)
    if not isinstance(made, Example):
        raise ValueError(f"two turns were dropped: {made.reason}")
    return made.ids[int(np.flatnonzero(made.trained)[-1]) + 1 :].tolist()


def judge_hash(source: str) -> str:
    """What tells one reward model from another, by the numbers that it judges with."""
    return run_hash(source) if is_run_folder(source) else _open(source).hash


def _open(source: str) -> Base:
    """The model of a judge, checked before its weights are read.

    Raises:
      UserError: it gives no rewards.
    """
    if is_run_folder(source):
        config = read_run_config(source)
        task = config.get("task", "sft")
        if task_of(task).head == HEAD:
            return base_of_run(config, _silent)
        got = f"a run of {task}"
    else:
        base = open_base(source, reward=True, note=_silent)
        if base.weights is not None and base.weights.head is not None:
            return base
        got = "a language model"
    raise UserError(
        "this has no head that gives rewards",
        where=f"{WHERE}={source}",
        expected="a run of configs/reward.py, or a model with one label "
        "(...ForSequenceClassification)",
        got=got,
    )


def _silent(text: str) -> None:
    """It is said once, where the weights are read."""
    del text
