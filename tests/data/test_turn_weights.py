"""Weights of messages: from a row to the weights of a batch."""

from typing import Any

import numpy as np
import pytest

from ftjax.data.dataset import build_dataset
from ftjax.data.groups import read_groups
from ftjax.data.loader import Loader
from ftjax.data.schema import normalise
from ftjax.data.sources import Row
from ftjax.data.tokenizer import Tokenizer
from tests.data.conftest import chat_row, data_config, example_of, fault_of

TURNS = ("hi", "the answer", "and", "is here", "so", "good")


def row(*keys: dict[str, Any]) -> dict[str, Any]:
    """A conversation of three turns, with keys of the messages."""
    found = chat_row(*TURNS)
    for message, more in zip(found["messages"], keys, strict=False):
        message |= more
    return found


def encoded(values: dict[str, Any], tokenizer: Tokenizer, **options: Any) -> Any:
    return example_of(normalise(Row(values, "d:1")).sample, tokenizer, **options)


WEIGHTS: tuple[dict[str, Any], ...] = (
    {},
    {"weight": 0.5},
    {"weight": 0},
    {"weight": 0},
    {"train": False},
    {},
)


def test_each_turn_counts_as_it_says(chatml: Tokenizer) -> None:
    plain, weighted = encoded(row(), chatml), encoded(row(*WEIGHTS), chatml)
    assert plain.weights is None
    np.testing.assert_array_equal(plain.ids, weighted.ids)
    # The three turns of the assistant, with their ends.
    edges = np.flatnonzero(np.diff(plain.trained.astype(int), prepend=0, append=0))
    turns = [slice(*edges[i : i + 2]) for i in (0, 2, 4)]
    expected = np.zeros(len(plain.ids), np.float32)
    expected[turns[0]], expected[turns[2]] = 0.5, 1
    np.testing.assert_array_equal(weighted.weights, expected)
    np.testing.assert_array_equal(weighted.trained, expected > 0)
    # Of whole rows, what is left out stays so, and the rest counts 1.
    whole = encoded(row(*WEIGHTS), chatml, completion_only=False)
    assert not whole.trained[turns[1]].any() and (whole.weights[turns[0]] == 0.5).all()
    others = np.setdiff1d(np.arange(1, len(plain.ids)), np.r_[turns[0], turns[1]])
    assert (whole.weights[others] == 1).all()


def test_batches_hold_the_weights(write: Any, chatml: Tokenizer) -> None:
    path = write([row(*WEIGHTS), row()])
    data = build_dataset(
        path, chatml, data_config(max_length=200), vocab_size=300, split="train"
    )
    load = Loader(data, length=200, packing=False, seed=0, shuffle=False)
    weights = load.batch(0, 2)["weights"]
    first, second = data.examples
    assert first.weights is not None
    np.testing.assert_array_equal(weights[0, : len(first.ids) - 1], first.weights[1:])
    np.testing.assert_array_equal(weights[1, : len(second.ids) - 1], second.trained[1:])
    plain = build_dataset(
        write([row(), row()], "p.jsonl"),
        chatml,
        data_config(max_length=200),
        vocab_size=300,
        split="train",
    )
    assert plain.fingerprint() != data.fingerprint()


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"weight": -1}, "no weight"),
        ({"weight": "1"}, "no weight"),
        ({"weight": True}, "no weight"),
        ({"weight": float("nan")}, "no weight"),
        ({"train": 1}, "neither true nor false"),
    ],
)
def test_what_is_no_weight(keys: dict[str, Any], what: str) -> None:
    fault = fault_of(lambda: normalise(Row(row({}, keys), "d:1")))
    assert what in fault.what and "message 1" in str(fault.where)


def test_only_answers_are_trained_on() -> None:
    fault = fault_of(lambda: normalise(Row(row({"train": True}), "d:1")))
    assert "assistant" in fault.what


def test_answers_that_are_compared_have_no_weights() -> None:
    def pair(**keys: Any) -> dict[str, Any]:
        prompt = [{"role": "user", "content": "a"}]
        sides = {"chosen": "b", "rejected": "c"}
        answers = {
            name: [{"role": "assistant", "content": text, **keys}]
            for name, text in sides.items()
        }
        return {"prompt": prompt, **answers}

    assert len(read_groups(Row(pair(weight=1), "d:1"), True, "pairs")) == 1
    fault = fault_of(lambda: read_groups(Row(pair(weight=2), "d:1"), True, "pairs"))
    assert "weights" in fault.what
