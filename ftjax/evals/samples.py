"""What the model answers to a few held-out prompts, along the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftjax.data.dataset import Dataset
from ftjax.data.encode import Example
from ftjax.data.tokenizer import Tokenizer

TEXT_PROMPT = 16  # tokens of a plain-text row that are given


@dataclass(frozen=True)
class Prompt:
    """A prompt as ids and as text, and what the data answers."""

    ids: list[int]
    text: str
    reference: str


def pick_prompts(dataset: Dataset, tokenizer: Tokenizer, count: int) -> list[Prompt]:
    """The first prompts of `count` rows at equal distances over a data set.

    The answer beside a prompt is the chosen one of a pair, or one that is rated good.
    """
    good = dataset.values.get("label", np.ones(len(dataset.groups)))
    groups = zip(dataset.groups, good, strict=True)
    rows = [dataset.examples[group[0]] for group, label in groups if label > 0]
    count = min(count, len(rows))
    return [_prompt(rows[i * len(rows) // count], tokenizer) for i in range(count)]


def _prompt(example: Example, tokenizer: Tokenizer) -> Prompt:
    ids = example.ids.tolist()
    trained = example.trained.tolist()
    if not any(trained):  # a prompt, and nothing to compare an answer with
        return Prompt(ids, tokenizer.decode(ids).strip(), "")
    start = trained.index(True)
    if start <= 1:
        start = max(1, min(TEXT_PROMPT, len(ids) // 2))
    end = start
    while end < len(ids) and trained[end]:
        end += 1
    prompt, answer = ids[:start], ids[start:end]
    return Prompt(
        prompt, tokenizer.decode(prompt).strip(), tokenizer.decode(answer).strip()
    )


def answer(
    generator: Any, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_tokens: int
) -> list[str]:
    """The likeliest answers, decoded without special tokens."""
    made = generator.generate([p.ids for p in prompts], max_tokens)
    return [tokenizer.decode(completion.tokens).strip() for completion in made]
