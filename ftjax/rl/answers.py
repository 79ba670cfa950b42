"""Prompts to answers, and answers to the rows of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftjax.data.dataset import Dataset
from ftjax.data.loader import Batch
from ftjax.data.tokenizer import Tokenizer
from ftjax.decoding.generator import Completion, Generator
from ftjax.decoding.sampling import Sampling
from ftjax.rl.rewards import Judge, Judged

Ids = Sequence[int]


@dataclass(frozen=True)
class Answers:
    """n completions and what they earn."""

    prompts: list[list[int]]
    completions: list[Completion]
    texts: list[str]
    judged: Judged

    @property
    def lengths(self) -> np.ndarray:
        """New tokens of each, float64 [n]."""
        return np.array([len(made.tokens) for made in self.completions], np.float64)

    @property
    def stopped(self) -> np.ndarray:
        """Whether each ended by itself, bool [n]."""
        return np.array([made.stopped for made in self.completions])


def answer_prompts(
    generator: Generator,
    tokenizer: Tokenizer,
    dataset: Dataset,
    rows: Sequence[int],
    new: int,
    sampling: Sampling,
    judge: Judge,
    max_num_seqs: int = 0,
) -> Answers:
    """Completions of some prompts of a data set, judged.

    Args:
      generator: of the policy.
      tokenizer: decodes what it says, without special tokens.
      dataset: of prompts.
      rows: the indices of the prompts; one may come several times.
      new: tokens per completion, at most.
      sampling: how they are drawn.
      judge: gives the rewards.
      max_num_seqs: answers that are written side by side; 0: all.
    """
    prompts = [dataset.examples[i].ids.tolist() for i in rows]
    made = generator.generate(prompts, new, sampling, max_num_seqs=max_num_seqs)
    texts = [tokenizer.decode(completion.tokens) for completion in made]
    judged = judge(
        [dataset.columns[i] for i in rows],
        texts,
        prompts,
        [completion.tokens for completion in made],
        [completion.stopped for completion in made],
    )
    return Answers(prompts, made, texts, judged)


def lay_out(prompts: Sequence[Ids], answers: Sequence[Ids], length: int) -> Batch:
    """One sequence per row, arrays [n, length]; see `data.loader`.

    Rows hold their last token too, where a head may read it; the weight of a position
    is 1 where its target is a token of the answer.
    """
    names = ("tokens", "targets", "segments", "positions")
    batch = {name: np.zeros((len(prompts), length), np.int32) for name in names}
    batch["weights"] = np.zeros((len(prompts), length), np.float32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids, end = [*prompt, *answer], len(prompt) + len(answer)
        batch["tokens"][row, :end] = ids
        batch["targets"][row, : end - 1] = ids[1:]
        batch["segments"][row, :end] = 1
        batch["positions"][row, :end] = np.arange(end)
        batch["weights"][row, len(prompt) - 1 : end - 1] = 1
    return batch
