"""A policy answers prompts and is judged: in rollouts, in evaluation, in samples."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ftjax.console import table
from ftjax.data.dataset import Dataset
from ftjax.decoding.generator import Generator
from ftjax.decoding.sampling import Sampling
from ftjax.loading import Base
from ftjax.objectives.online import LENGTH
from ftjax.rl.answers import Answers, answer_prompts
from ftjax.rl.rewards import Judge

PyTree = Any
EVAL_SEED, TRAIN_SEED = 0, 1  # streams of random numbers


class Shown(NamedTuple):
    """A line of the table of answers."""

    prompt: str
    answer: str
    reward: float


class Player:
    """Lets a policy answer, and the judge judge.

    Args:
      base: of the policy.
      dtype: of the computation.
      seed: of the run.
      rollout: `config.rollout`.
      judge: gives the rewards.
    """

    def __init__(self, base: Base, dtype: Any, seed: int, rollout: Any, judge: Judge):
        self.base, self.dtype, self.seed = base, dtype, seed
        self.rollout, self.judge = rollout, judge

    def answer(
        self,
        policy: PyTree,
        dataset: Dataset,
        rows: Sequence[int],
        temperature: float,
        seed: int,
        most: int = 0,
    ) -> Answers:
        """Answers of the policy to some prompts of a data set.

        Args:
          policy: its variables.
          dataset: of prompts.
          rows: the indices of the prompts.
          temperature: of the answers.
          seed: of their random numbers.
          most: answers side by side, where `config.rollout.max_num_seqs` does not say.
        """
        c, base = self.rollout, self.base
        generator = Generator(
            base.spec,
            policy,
            dtype=self.dtype,
            eos_ids=base.eos_ids,
            # Added to weights of a lower precision, a small update would be rounded
            # away: the policy that answers would not be the one that is trained.
            apart=jnp.dtype(self.dtype) != jnp.float32,
        )
        sampling = Sampling(temperature, c.top_k, c.top_p, seed)
        return answer_prompts(
            generator,
            base.tokenizer,
            dataset,
            rows,
            c.max_new_tokens,
            sampling,
            self.judge,
            c.max_num_seqs or most,
        )

    def evaluate(self, policy: PyTree, dataset: Dataset, size: int) -> dict[str, float]:
        """The mean reward, `loss` (minus that), other means, and `tokens`.

        Args:
          policy: its variables.
          dataset: of prompts, each answered once.
          size: answers side by side, where the config does not say.
        """
        rows = range(len(dataset.examples))
        seed = seed_of(self.seed, EVAL_SEED, 0)
        temperature = self.rollout.eval_temperature
        answers = self.answer(policy, dataset, rows, temperature, seed, size)
        whole, tokens = answer_metrics(answers), int(answers.lengths.sum())
        known = {k: x[~np.isnan(x)] for k, x in whole.items()}
        means = {k: float(x.mean()) for k, x in known.items() if len(x)}
        reward = means.get("reward", math.nan)
        return {"loss": -reward, "reward": reward, **means, "tokens": tokens}

    def show(self, policy: PyTree, dataset: Dataset, count: int) -> list[Shown]:
        """The likeliest answers to `count` prompts at equal distances."""
        count = min(count, len(dataset.examples))
        if not count:
            return []
        rows = [i * len(dataset.examples) // count for i in range(count)]
        answers = self.answer(policy, dataset, rows, 0.0, 0)
        prompts = [_last_words(dataset.columns[i]["prompt"]) for i in rows]
        texts = [text.strip() for text in answers.texts]
        rewards = answers.judged.total.tolist()
        return [Shown(*one) for one in zip(prompts, texts, rewards, strict=True)]


def _last_words(prompt: Any) -> str:
    """A prompt for people: of messages what the user said last."""
    return (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip()


def shown_table(rows: Sequence[Shown]) -> str:
    """For the console."""
    return table(rows, Shown._fields, wrap=40)


def answer_metrics(answers: Answers) -> dict[str, np.ndarray]:
    """Metrics per completion under TRL's names, [n]; NaN where one says nothing."""
    lengths, stopped = answers.lengths, answers.stopped
    judged = answers.judged
    each = {f"rewards/{name}/mean": x for name, x in judged.each.items()}
    return {
        "reward": judged.total,
        **each,
        "frac_reward_nan": judged.bad.astype(np.float64),
        LENGTH: lengths,
        "completions/mean_terminated_length": np.where(stopped, lengths, math.nan),
        "completions/clipped_ratio": 1.0 - stopped,
        "completions/empty_ratio": np.array(
            [float(not text.strip()) for text in answers.texts]
        ),
    }


def seed_of(seed: int, stream: int, number: int) -> int:
    """31 bits that follow from the run's seed, the stream and the number in it."""
    counter = np.random.Philox(key=[seed, stream], counter=[number, 0, 0, 0])
    return int(counter.random_raw() >> 33)
