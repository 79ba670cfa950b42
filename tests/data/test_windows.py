"""Texts in windows and in one stream; the bytes that tokens stand for."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from ftjax.data.dataset import Dataset, build_dataset
from ftjax.data.encode import Example
from ftjax.data.sources import read_rows
from ftjax.data.tokenizer import Tokenizer
from ftjax.data.windows import joined, windows
from tests.data.conftest import data_config, fault_of

END = "<|endoftext|>"
TEXT = "naïve 日本 😀 x\n\n the answer is here, and the question is there "


def texts(path: str, separator: str) -> list[tuple[str, str]]:
    rows = read_rows(path, separator=separator)
    return [(row.values["text"], row.where.split(":")[1]) for row in rows]


@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        (f"a\nb\n{END}\n{END}\n\n\nc\n{END}\n", END, [("a\nb", "1"), ("c", "7")]),
        ("a\nb\n\n\n\nc\n", "\n\n", [("a\nb", "1"), ("c", "6")]),
        ("a\nb\n\nc", "\\n\\n", [("a\nb", "1"), ("c", "4")]),
        ("a --- b\n---\nc", "---", [("a --- b", "1"), ("c", "3")]),
        ("a\nb", END, [("a\nb", "1")]),
        (f"a\r\nb\r\n{END}\r\nc", END, [("a\nb", "1"), ("c", "4")]),
        ("a\nb\n", "\n", [("a", "1"), ("b", "2")]),
    ],
)
def test_documents_end_at_the_separator(
    text: str, separator: str, expected: Any, write: Any
) -> None:
    assert texts(write(text.encode(), "d.txt"), separator) == expected


def example(n: int, **values: Any) -> Example:
    trained = np.arange(n) > 0
    return Example(np.arange(100, 100 + n, dtype=np.int32), trained, "d:1", **values)


def predicted(parts: list[Example]) -> list[int]:
    return [int(i) for part in parts for i in part.ids[part.trained]]


@pytest.mark.parametrize("n", [2, 8, 9, 15, 16, 50])
def test_every_token_after_the_first_is_predicted_once(n: int) -> None:
    whole = example(n, sizes=np.arange(n, dtype=np.int32))
    parts = windows(whole, 8)
    assert predicted(parts) == whole.ids[1:].tolist()
    assert all(len(part.ids) == 8 for part in parts[:-1]) and len(parts[-1].ids) <= 8
    # What was predicted last is what the next window begins with.
    for before, after in pairwise(parts):
        assert before.ids[-1] == after.ids[0]
    counted = sum(p.sizes[p.trained].sum() for p in parts if p.sizes is not None)
    assert counted == np.arange(n)[1:].sum()


def test_windows_without_a_trained_token_are_left_out() -> None:
    whole = example(30)
    whole.trained[:20] = False
    assert predicted(windows(whole, 8)) == whole.ids[20:].tolist()


def test_a_stream_predicts_the_first_tokens_of_texts_too() -> None:
    one, two, answer = example(5), example(7), example(6)
    answer.trained[:3] = False
    stream = joined([one, two, answer], [True, True, False])
    assert len(stream.ids) == 18
    assert stream.trained.tolist() == [False] + [True] * 11 + [False] * 3 + [True] * 3
    assert not two.trained[0]


def built(
    path: str, tokenizer: Tokenizer, split: str = "train", **data: Any
) -> Dataset:
    return build_dataset(
        path, tokenizer, data_config(**data), vocab_size=300, split=split
    )


def test_long_texts_are_split_and_not_cut(write: Any, plain: Tokenizer) -> None:
    path = write([{"text": "the answer is here " * 30}, {"text": "short"}])
    whole = built(path, plain, max_length=500)
    parts = built(path, plain, max_length=16, overlong="split")
    assert predicted(parts.examples) == predicted(whole.examples)
    assert max(len(e.ids) for e in parts.examples) == 16
    report = parts.report
    assert (report.kept, report.lost, report.truncated) == (2, 0, 0)
    assert report.windows == len(parts.groups) > 5
    assert f"in windows of 16  {report.windows}" in report.text()


def test_one_stream_fills_all_windows_but_the_last(
    write: Any, plain: Tokenizer
) -> None:
    path = write([{"text": "the answer"}, {"text": "is here " * 9}, {"text": "and"}])
    stream = built(path, plain, max_length=8, join=True)
    alone = built(path, plain, max_length=500)
    tokens = np.concatenate([e.ids for e in alone.examples])
    assert predicted(stream.examples) == tokens[1:].tolist()
    assert all(len(e.ids) == 8 for e in stream.examples[:-1])
    assert "see those before" in stream.report.text()


def test_answers_that_are_compared_are_not_split(write: Any, plain: Tokenizer) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    config = data_config(overlong="split", join=True)
    fault = fault_of(
        lambda: build_dataset(
            write(rows), plain, config, vocab_size=300, split="train", reads="pairs"
        )
    )
    assert "overlong=split, join=True" in str(fault.got)


@pytest.mark.parametrize("add_bos", [True, False])
def test_bytes_are_those_of_the_text(
    add_bos: bool, write: Any, make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer(add_bos=add_bos)
    path = write([{"text": TEXT}])
    [whole] = built(path, tokenizer, "eval", max_length=500).examples
    assert whole.sizes is not None and len(whole.sizes) == len(whole.ids)
    assert whole.sizes.sum() == len(TEXT.encode())
    assert whole.sizes[-1] == 0  # the end of the text is no text
    first = 0 if add_bos else int(whole.sizes[0])
    for changes in ({"max_length": 500}, {"max_length": 7, "overlong": "split"}):
        data = built(path, tokenizer, "eval", **changes)
        assert data.text_bytes == len(TEXT.encode()) - first
    assert built(path, tokenizer, "train").text_bytes is None


def test_bytes_of_answers_are_those_of_what_is_learned(
    write: Any, plain: Tokenizer
) -> None:
    path = write([{"prompt": "the naïve", "completion": " 日本 😀"}])
    data = built(path, plain, "eval")
    assert data.text_bytes == len(" 日本 😀".encode())
