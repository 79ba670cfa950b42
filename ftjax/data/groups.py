"""Rows to groups of samples that belong together: an answer, a pair, a rated answer.

A task reads one kind of rows, or a stream of all of them (`mixed`, for ORPO). Every
group of a data set has as many members as its kind of task needs; a pair is (chosen,
rejected). What else a row says of its group is a number per group.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftjax.data import preferences
from ftjax.data.encode import Example
from ftjax.data.prompts import read_prompt
from ftjax.data.schema import (
    RATINGS,
    Conversation,
    PromptCompletion,
    Sample,
    TextRow,
    normalise,
)
from ftjax.data.sources import Row
from ftjax.data.turn_weights import turn_weights, weighted
from ftjax.errors import UserError

READS = ("answers", "pairs", "rated", "mixed", "prompts")
# Members of a group, and the numbers that come with one.
MEMBERS = {"answers": 1, "pairs": 2, "rated": 2, "mixed": 2, "prompts": 1}
KINDS = ("pair", "answer", "text")  # of the rows of a mixture
VALUES: dict[str, tuple[str, ...]] = {
    "answers": (),
    "pairs": ("pair", "margin"),
    "rated": ("rated", "label"),
    "mixed": KINDS,
    "prompts": (),
}


@dataclass(frozen=True)
class Group:
    """Samples of one row that belong together.

    Attributes:
      samples: one, or the chosen and the rejected of a pair.
      schema: by which the row was read; ignored: the columns that were not used.
      values: numbers of the group, by name; those that are not named are 0.
      identical: both sides of a pair are the same.
      columns: of a prompt, whatever else its row says.
      ahead: by how much the chosen one scores more, where both have a score.
    """

    samples: tuple[Sample, ...]
    schema: str
    ignored: tuple[str, ...] = ()
    values: dict[str, float] = field(default_factory=dict)
    identical: bool = False
    columns: dict[str, Any] = field(default_factory=dict)
    ahead: float | None = None

    @property
    def where(self) -> str:
        return self.samples[0].where


Encoded = tuple[Group, tuple[Example, ...]]


def read_groups(row: Row, has_template: bool, reads: str) -> list[Group]:
    """The groups of a row, for a task that reads `reads` (one of READS).

    Raises:
      UserError: the row is not of a kind that the task reads, or has a fault.
    """
    if reads == "prompts":
        return [_prompt(row, has_template)]
    is_pair = preferences.sides(row.values) is not None
    label = preferences.rating(row.values)
    if reads == "answers":
        return [_answer(row, has_template)]
    if reads == "mixed":
        return [(pair_of if is_pair else _answer)(row, has_template)]
    if reads == "rated" and label is not None and not is_pair:
        return [_rated(row, label, has_template)]
    if not is_pair:
        raise preferences.no_pair(row, reads == "rated")
    pair = pair_of(row, has_template)
    return _unpaired(pair) if reads == "rated" else [pair]


def _prompt(row: Row, has_template: bool) -> Group:
    prompt, schema, columns = read_prompt(row, has_template)
    return Group((prompt,), schema, columns={"prompt": prompt.prompt, **columns})


def _answer(row: Row, has_template: bool) -> Group:
    found = normalise(row, has_template)
    kind = "text" if isinstance(found.sample, TextRow) else "answer"
    return Group(
        (found.sample,), found.schema, found.ignored, {kind: 1.0}, found.identical
    )


def pair_of(row: Row, has_template: bool) -> Group:
    """The pair of a row that holds both sides.

    Raises:
      UserError: the sides do not make a pair.
    """
    columns = preferences.sides(row.values) or ()
    rated = preferences.scores(row)
    used = (*preferences.USED, *columns, *rated, "margin")
    ahead = float(row.values[rated[0]] - row.values[rated[1]]) if rated else None
    both = preferences.read_pair(row, has_template)
    samples = tuple(_sample(prompt, answer, row.where) for prompt, answer in both)
    return Group(
        samples,
        "/".join(columns),
        tuple(name for name in row.values if name not in used),
        {"pair": 1.0, "margin": preferences.read_margin(row)},
        identical=both[0] == both[1],
        ahead=ahead,
    )


def _unpaired(pair: Group) -> list[Group]:
    """A pair as a good answer and a bad one."""
    return [
        dataclasses.replace(
            pair, samples=(sample,), values={"rated": 1.0, "label": float(good)}
        )
        for sample, good in zip(pair.samples, (True, False), strict=True)
    ]


def _rated(row: Row, column: str, has_template: bool) -> Group:
    good = preferences.read_label(row, column)
    rest = {name: x for name, x in row.values.items() if name not in RATINGS}
    bare = preferences.rules_first(Row(rest, row.where), has_template)
    found = normalise(bare, has_template)
    sample = found.sample
    if isinstance(sample, Conversation):
        if sample.weights is not None:
            raise weighted(row.where)
        # What is rated is the last answer of a conversation.
        first = sample.train_from or len(sample.messages) - 1
        sample = dataclasses.replace(sample, train_from=first)
    values = {"rated": 1.0, "label": float(good)}
    return Group((sample,), f"{found.schema}/{column}", found.ignored, values)


def _sample(prompt: Any, answer: Any, where: str) -> Sample:
    if isinstance(prompt, str):
        return PromptCompletion(prompt, answer, where)
    messages = preferences.checked(prompt, answer, where)
    if turn_weights([*prompt, *answer], where) is not None:
        raise weighted(where)
    return Conversation(messages, where, train_from=len(prompt))


def mismatched(examples: list[Example], most: int) -> list[Example]:
    """Each prompt with the answer to the next other prompt: KTO's estimate of the KL.

    TRL turns the answers by one (to the one before) inside each batch; here it is
    the data set as a whole, so that it does not depend on the batch size, and the good
    and the bad answer to one prompt, which follow each other, are not exchanged.

    Args:
      examples: rated answers, in the order of the source.
      most: tokens that one may have.
    """
    prompts = [example.ids[: _border(example)].tobytes() for example in examples]
    count = len(examples)
    later = [1 % count] * count  # where all prompts are one, there is no other
    found = later
    for i in reversed(range(2 * count)):
        own, following = i % count, (i + 1) % count
        same = prompts[own] == prompts[following]
        found[own] = found[following] if same else following
    return [
        _swap(one, examples[j], most) for one, j in zip(examples, found, strict=True)
    ]


def _swap(one: Example, other: Example, most: int) -> Example:
    prompt, answer = _border(one), _border(other)
    ids = np.concatenate([one.ids[:prompt], other.ids[answer:]])[:most]
    trained = np.concatenate([one.trained[:prompt], other.trained[answer:]])[:most]
    return Example(ids, trained, one.where)


def _border(example: Example) -> int:
    """Where the answer begins."""
    return int(example.trained.argmax())


def shared_prompt(pair: tuple[Example, ...]) -> int:
    """How many tokens both members begin with, before either's answer; 0 of one."""
    if len(pair) != 2:
        return 0
    one, other = pair
    most = min(_border(one), _border(other))
    differ = one.ids[:most] != other.ids[:most]
    return int(differ.argmax()) if differ.any() else most


def same_prompt(pair: tuple[Example, ...]) -> bool:
    """Whether both sides have the same tokens before their answers."""
    chosen, rejected = pair
    n, m = _border(chosen), _border(rejected)
    return n == m and bool((chosen.ids[:n] == rejected.ids[:n]).all())


def both_ways(values: dict[str, np.ndarray], hashes: np.ndarray) -> int:
    """Answers that are rated good in one row and bad in another."""
    if "label" not in values:
        return 0
    good = values["label"] > 0
    return len(np.intersect1d(hashes[good], hashes[~good]))


def refuse_no_signal(source: str, reads: str, values: dict[str, np.ndarray]) -> None:
    """Answers that are all good, or all bad, teach nothing about the difference.

    Raises:
      UserError: if so.
    """
    if reads == "rated" and len(set(values["label"].tolist())) == 1:
        kind = "good" if values["label"][0] else "bad"
        raise UserError(
            f"every answer is a {kind} one: there is nothing to tell apart",
            where=source,
            expected="rows with `label` true and rows with `label` false",
        )
