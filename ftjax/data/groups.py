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
from ftjax.data.schema import Conversation, PromptCompletion, Sample, TextRow, normalise
from ftjax.data.sources import Row
from ftjax.errors import UserError

READS = ("answers", "pairs", "rated", "mixed")
# Members of a group, and the numbers that come with one.
MEMBERS = {"answers": 1, "pairs": 2, "rated": 2, "mixed": 2}
KINDS = ("pair", "answer", "text")  # of the rows of a mixture
VALUES: dict[str, tuple[str, ...]] = {
    "answers": (),
    "pairs": ("pair", "margin"),
    "rated": ("rated", "label"),
    "mixed": KINDS,
}


@dataclass(frozen=True)
class Group:
    """Samples of one row that belong together.

    Attributes:
      samples: one, or the chosen and the rejected of a pair.
      schema: by which the row was read; ignored: the columns that were not used.
      values: numbers of the group, by name; those that are not named are 0.
      identical: both sides of a pair are the same.
    """

    samples: tuple[Sample, ...]
    schema: str
    ignored: tuple[str, ...] = ()
    values: dict[str, float] = field(default_factory=dict)
    identical: bool = False

    @property
    def where(self) -> str:
        return self.samples[0].where


def read_groups(row: Row, has_template: bool, reads: str) -> list[Group]:
    """The groups of a row, for a task that reads `reads` (one of READS).

    Raises:
      UserError: the row is not of a kind that the task reads, or has a fault.
    """
    is_pair = preferences.sides(row.values) is not None
    label = preferences.rating(row.values)
    if reads == "answers":
        return [_answer(row, has_template)]
    if reads == "mixed":
        return [(pair_of if is_pair else _answer)(row, has_template)]
    if reads == "rated" and label is not None and not is_pair:
        return [_rated(row, label)]
    if not is_pair:
        raise preferences.no_pair(row, "this task")
    pair = pair_of(row, has_template)
    return _unpaired(pair) if reads == "rated" else [pair]


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
    used = (*preferences.USED, *columns, "margin")
    both = preferences.read_pair(row, has_template)
    samples = tuple(_sample(prompt, answer, row.where) for prompt, answer in both)
    return Group(
        samples,
        "/".join(columns),
        tuple(name for name in row.values if name not in used),
        {"pair": 1.0, "margin": preferences.read_margin(row)},
        identical=both[0] == both[1],
    )


def _unpaired(pair: Group) -> list[Group]:
    """A pair as a good answer and a bad one."""
    return [
        dataclasses.replace(
            pair, samples=(sample,), values={"rated": 1.0, "label": float(good)}
        )
        for sample, good in zip(pair.samples, (True, False), strict=True)
    ]


def _rated(row: Row, column: str) -> Group:
    good = preferences.read_label(row, column)
    rest = {name: x for name, x in row.values.items() if name != column}
    found = normalise(Row(rest, row.where))
    values = {"rated": 1.0, "label": float(good)}
    return Group((found.sample,), f"{found.schema}/{column}", found.ignored, values)


def _sample(prompt: Any, answer: Any, where: str) -> Sample:
    if isinstance(prompt, str):
        return PromptCompletion(prompt, answer, where)
    messages = preferences.checked(prompt, answer, where)
    return Conversation(messages, where, train_from=len(prompt))


def mismatched(examples: list[Example], most: int) -> list[Example]:
    """Each prompt with the answer of the next example: KTO's estimate of the KL.

    TRL turns the answers by one inside each batch of the data as it comes; here it is
    the data set as a whole, so that it does not depend on the batch size.

    Args:
      examples: rated answers, in the order of the source.
      most: tokens that one may have.
    """
    others = [*examples[1:], *examples[:1]]
    return [
        _swap(one, other, most) for one, other in zip(examples, others, strict=True)
    ]


def _swap(one: Example, other: Example, most: int) -> Example:
    prompt, answer = _border(one), _border(other)
    ids = np.concatenate([one.ids[:prompt], other.ids[answer:]])[:most]
    trained = np.concatenate([one.trained[:prompt], other.trained[answer:]])[:most]
    return Example(ids, trained, one.where)


def _border(example: Example) -> int:
    """Where the answer begins."""
    return int(example.trained.argmax())


def same_prompt(pair: tuple[Example, ...]) -> bool:
    """Whether both sides have the same tokens before their answers."""
    chosen, rejected = pair
    n, m = _border(chosen), _border(rejected)
    return n == m and bool((chosen.ids[:n] == rejected.ids[:n]).all())


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
