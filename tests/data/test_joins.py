"""Halves of pairs in different rows: what joins, in which order, what is left over."""

import pytest

from ftjax.data.dataset import build_dataset
from ftjax.data.joins import NO_CHOSEN, NO_REJECTED
from tests.data.conftest import data_config, fault_of


def good(prompt, answer):
    return {"prompt": prompt, "chosen": answer}


def bad(prompt, answer):
    return {"prompt": prompt, "rejected": answer}


def build(path, tokenizer, reads="mixed", **settings):
    return build_dataset(
        path,
        tokenizer,
        data_config(**settings),
        vocab_size=tokenizer.vocab_size,
        split="train",
        reads=reads,
    )


def places(data):
    """Of each group, the rows that it is of."""
    return [
        " ".join(part.rpartition(":")[2] for part in where.split(" with "))
        for where in (data.examples[group[0]].where for group in data.groups)
    ]


MANY = [
    good("q", " one"),
    bad("q", " two"),
    {"text": "between them"},
    bad("q", " three"),
    bad("p", " four"),
    good("q", " five"),
    good("r", " six"),
]


def test_each_chosen_with_each_rejected_where_the_later_comes(write, plain):
    data = build(write(MANY), plain, join_window=10)
    assert places(data) == ["1 2", "3", "1 4", "6 2", "6 4", "7"]
    assert data.values["pair"].tolist() == [1, 0, 1, 1, 1, 0]
    assert data.values["answer"].tolist() == [0, 0, 0, 0, 0, 1]
    report = data.report
    assert (report.read, report.kept, report.joined, report.imitated) == (7, 6, 4, 1)
    assert report.kinds == {"pair": 4, "answer": 1, "text": 1}
    assert report.dropped[NO_CHOSEN].places == ["d.jsonl:5"]
    for part in ("chosen alone: 3", "pairs joined", "to imitate", "kept as pair"):
        assert part in report.text()


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (4, ["1 2", "3", "1 4", "6 2", "6 4", "7"]),
        (3, ["1 2", "3", "1 4", "6 4", "7"]),
        (2, ["1 2", "3", "6 4", "7"]),
        (1, ["1 2", "3", "6", "7"]),
        (0, ["1", "3", "6", "7"]),
    ],
)
def test_the_window_is_counted_in_rows(write, plain, window, expected):
    data = build(write(MANY), plain, join_window=window)
    assert places(data) == expected


def test_what_leaves_the_window_comes_where_it_leaves(write, plain):
    rows = [good("q", " a"), *({"text": f"row {i}"} for i in range(4))]
    assert places(build(write(rows), plain, join_window=2)) == ["2", "3", "1", "4", "5"]


def test_a_joined_pair_is_the_pair_in_one_row(write, plain, chatml):
    whole = {"prompt": "q", "chosen": " a", "rejected": " b", "system": "be kind"}
    halves = [{k: v for k, v in whole.items() if k != side} for side in ("rejected",)]
    halves.append({k: v for k, v in whole.items() if k != "chosen"})
    talk = [{"role": "user", "content": "q"}]
    sides = [[{"role": "assistant", "content": text}] for text in "ab"]
    spoken = [
        {"chosen": [*talk, *sides[0]], "rejected": None},
        {"rejected": [*talk, *sides[1]]},
    ]
    for tokenizer, one, two in (
        (plain, [whole], halves),
        (plain, [whole], halves[::-1]),
        (chatml, [whole], halves),
        (chatml, [{"prompt": talk, "chosen": sides[0], "rejected": sides[1]}], spoken),
    ):
        found = [build(write(rows), tokenizer) for rows in (one, two)]
        assert found[0].fingerprint() == found[1].fingerprint()


def test_a_chosen_answer_alone_is_one_to_imitate(write, plain):
    path = write([good("q", " a")])
    same = build(write([{"prompt": "q", "completion": " a"}], "e.jsonl"), plain)
    assert build(path, plain).fingerprint() == same.fingerprint()


def test_a_task_of_pairs_drops_what_is_left(write, plain):
    data = build(write(MANY), plain, "pairs", join_window=3, on_bad_row="skip")
    assert places(data) == ["1 2", "1 4", "6 4"]
    assert data.report.dropped[NO_REJECTED].places == ["d.jsonl:7"]
    assert data.report.dropped[NO_CHOSEN].count == 1
    error = fault_of(lambda: build(write([good("q", " a")]), plain, "pairs"))
    assert NO_REJECTED in error.got


def test_faults_of_halves_name_their_rows(write, plain, chatml):
    error = fault_of(lambda: build(write([{"chosen": " a"}]), plain))
    assert error.where == "d.jsonl:1" and "does not say what it answers" in error.what
    error = fault_of(lambda: build(write([good("q", 3)]), plain))
    assert (error.where, error.got) == ("d.jsonl:1", "a number: 3")
    mixed = [good("q", " a"), bad("q", [{"role": "assistant", "content": "b"}])]
    error = fault_of(lambda: build(write(mixed), chatml))
    assert error.where == "d.jsonl:1 with d.jsonl:2"
    data = build(write([*mixed, bad("q", " b")]), chatml, on_bad_row="skip")
    assert places(data) == ["1 3"] and data.report.skipped_rows == 1
