"""Every form that a preference comes in, to the same pairs; and the traps in them."""

from typing import Any

import numpy as np
import pytest

from ftjax.data.dataset import build_dataset, note_overlap
from ftjax.data.encode import EMPTY, NO_ROOM, SAME, SAME_CUT, TIE, TOO_LONG
from ftjax.data.loader import Loader, row_length
from ftjax.data.show import show_group
from ftjax.evals.samples import pick_prompts
from tests.data.conftest import data_config, fault_of

USER = {"role": "user", "content": "q"}
RULES = {"role": "system", "content": "rules"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
PAIR = {"prompt": "q:", "chosen": " good", "rejected": " bad"}
TALK = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
RULED = "<|im_start|>system\nrules<|im_end|>\n" + TALK
GPT = {"from": "gpt", "value": "good"}, {"from": "gpt", "value": "bad"}


def build(path: str, tokenizer: Any, reads: str = "pairs", **settings: Any) -> Any:
    split = settings.pop("use", "train")
    return build_dataset(
        path,
        tokenizer,
        data_config(**settings),
        vocab_size=tokenizer.vocab_size,
        split=split,
        reads=reads,
    )


def sides(data: Any, tokenizer: Any, group: int = 0) -> list[tuple[str, str]]:
    """(what is given, what is trained on) of each member of a group."""
    found = []
    for index in data.groups[group]:
        example = data.examples[index]
        start = int(example.trained.argmax())
        assert example.trained[start:].sum() > 0
        given, own = example.ids[:start], example.ids[start:][example.trained[start:]]
        parts = (tokenizer.decode(x.tolist(), skip_special=False) for x in (given, own))
        found.append(tuple(parts))
    return found


PLAIN = {
    "explicit": (PAIR, "q:"),
    "implicit": ({"chosen": "q: good", "rejected": "q: bad"}, "q:"),
    "system": ({**PAIR, "system": "rules"}, "rules\n\nq:"),
    "implicit, system": (
        {"system": "rules", "chosen": "q: good", "rejected": "q: bad"},
        "rules\n\nq:",
    ),
    "AutoTrain": ({"prompt": "q:", "text": " good", "rejected_text": " bad"}, "q:"),
    "AutoTrain without prompt": ({"text": "q: good", "rejected_text": "q: bad"}, "q:"),
    "Alpaca ranking": (
        {"instruction": "do", "input": "it", "chosen": " good", "rejected": " bad"},
        "do\nit\n",
    ),
}


@pytest.mark.parametrize("form", PLAIN)
def test_texts_become_a_prompt_and_two_answers(
    form: str, write: Any, plain: Any
) -> None:
    row, prompt = PLAIN[form]
    data = build(write([row]), plain)
    assert sides(data, plain) == [(prompt, " good</s>"), (prompt, " bad</s>")]
    assert data.groups == [(0, 1)] and data.values["pair"].tolist() == [1]
    assert not data.report.ignored and not data.report.conversations


CHAT = {
    "explicit": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, TALK),
    "prompt repeated": (
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        TALK,
    ),
    "implicit": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, TALK),
    "UltraFeedback": (
        {
            "prompt": "q",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "score_chosen": 8.0,
            "score_rejected": 6,
        },
        TALK,
    ),
    "UltraFeedback with rules": (
        {"prompt": "q", "chosen": [RULES, USER, GOOD], "rejected": [RULES, USER, BAD]},
        RULED,
    ),
    "text after messages": (
        {"prompt": [USER], "chosen": "good", "rejected": "bad"},
        TALK,
    ),
    "system column": (
        {"system": "rules", "prompt": "q", "chosen": "good", "rejected": "bad"},
        RULED,
    ),
    "ShareGPT ranking": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": GPT[0],
            "rejected": GPT[1],
            "system": "rules",
        },
        RULED,
    ),
    "Alpaca ranking": (
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        TALK,
    ),
    "Orca": (
        {"system": "rules", "question": "q", "chosen": "good", "rejected": "bad"},
        RULED,
    ),
}


@pytest.mark.parametrize("form", CHAT)
def test_messages_become_the_same_conversation(
    form: str, write: Any, chatml: Any
) -> None:
    row, prompt = CHAT[form]
    data = build(write([row]), chatml)
    answers = [(prompt, f"{word}<|im_end|>") for word in ("good", "bad")]
    assert sides(data, chatml) == answers
    assert not data.report.ignored and data.report.conversations == 1


def test_turns_before_the_answer_are_given(write: Any, chatml: Any) -> None:
    row = {
        "instruction": "q",
        "history": [["one", "two"]],
        "chosen": "good",
        "rejected": "bad",
    }
    [(prompt, answer), _] = sides(build(write([row]), chatml), chatml)
    assert "two<|im_end|>" in prompt and answer == "good<|im_end|>"


RATED = {
    "prompt/completion": {"prompt": "q:", "completion": " good", "label": True},
    "numbers": {"prompt": "q:", "completion": " good", "kto_tag": 1},
    "Alpaca": {"instruction": "q:", "output": " good", "kto_tag": True},
}


@pytest.mark.parametrize("form", RATED)
def test_an_answer_may_be_rated(form: str, write: Any, plain: Any) -> None:
    tag = "label" if "label" in RATED[form] else "kto_tag"
    rows = [RATED[form], {"prompt": "p:", "completion": " bad", tag: False}]
    data = build(write(rows), plain, "rated")
    end = "\n" if form == "Alpaca" else ""
    own, other = sides(data, plain)
    assert own == ("q:" + end, " good</s>") and other == ("q:" + end, " bad</s>")
    assert data.values["label"].tolist() == [1, 0]
    assert data.report.tokens == sum(len(data.examples[g[0]].ids) for g in data.groups)


def test_what_is_rated_of_a_conversation_is_its_last_answer(
    write: Any, chatml: Any
) -> None:
    talk = [USER, {"role": "assistant", "content": "first"}, USER, GOOD]
    rows = [{"messages": talk, "label": True}, {"messages": [USER, BAD], "label": 0}]
    own, _ = sides(build(write(rows), chatml, "rated"), chatml)
    assert "first" in own[0] and own[1] == "good<|im_end|>"


def test_rules_come_before_a_rated_answer(write: Any, plain: Any, chatml: Any) -> None:
    row = {"system": "rules", "prompt": "q", "completion": "good", "label": True}
    rows = write([row, {**row, "label": False, "completion": "bad"}])
    assert sides(build(rows, plain, "rated"), plain)[0][0] == "rules\n\nq"
    data = build(rows, chatml, "rated")
    assert sides(data, chatml)[0][0] == RULED and not data.report.ignored


def test_no_answer_is_exchanged_with_one_to_the_same_prompt(
    write: Any, plain: Any
) -> None:
    """Pairs, as rated answers: the good and the bad one follow each other."""
    rows = [{**PAIR, "prompt": f"{n}:", "chosen": f" good {n}"} for n in "abc"]
    data = build(write(rows), plain, "rated")
    assert data.values["label"].tolist() == [1, 0] * 3
    found = [sides(data, plain, group) for group in range(6)]
    given = [own[0] for own, _ in found]
    assert given == ["a:", "a:", "b:", "b:", "c:", "c:"]
    assert [other[0] for _, other in found] == given
    others = [other[1] for _, other in found]
    first = [f" good {n}</s>" for n in "bbccaa"]
    assert others == first


def test_a_margin_is_read_and_must_be_a_number(write: Any, plain: Any) -> None:
    rows = [{**PAIR, "margin": 1.5}, {**PAIR, "prompt": "p:", "margin": None}]
    assert build(write(rows), plain).values["margin"].tolist() == [1.5, 0]
    for bad in (float("nan"), "much", True, 10**40):
        fault = fault_of(lambda bad=bad: build(write([{**PAIR, "margin": bad}]), plain))
        assert "margin" in fault.what and fault.where == "d.jsonl:1"


def test_both_sides_of_a_pair_are_in_one_row(write: Any, plain: Any) -> None:
    rows = [{**PAIR, "prompt": "q" * n, "chosen": "a" * (30 - n)} for n in range(1, 25)]
    data = build(write(rows), plain, max_length=32)
    length = row_length(data, max_length=32, packing=True)
    assert length == 64  # two sides of up to 31 tokens
    loader = Loader(data, length=length, packing=True, seed=0, shuffle=True)
    batch = loader.batch(0, loader.rows_per_epoch)
    assert batch["pair"].sum() == len(rows)
    for row in range(loader.rows_per_epoch):
        segments = set(batch["segments"][row].tolist()) - {0}
        assert segments == set(range(1, 2 * int(batch["pair"][row].sum()) + 1))


def test_the_last_token_is_an_input_where_a_head_reads_it(
    write: Any, plain: Any
) -> None:
    data = build(write([PAIR]), plain)
    found = {}
    for ends in (False, True):
        data.ends = ends
        made = Loader(data, length=32, packing=True, seed=0, shuffle=False)
        found[ends] = made.batch(0, 1)
    size = len(data.examples[0].ids)
    row = found[True]["tokens"][0]
    assert row[:size].tolist() == data.examples[0].ids.tolist()
    assert (found[True]["segments"] == 1).sum() == size
    assert (found[False]["segments"] == 1).sum() == size - 1
    assert found[True]["weights"].sum() == found[False]["weights"].sum()
    assert found[True]["weights"][0, size - 1] == 0


TRAPS = {
    "identical": ({**PAIR, "rejected": " good"}, SAME),
    "identical once cut": (
        {**PAIR, "chosen": "z" * 90, "rejected": "z" * 80},
        SAME_CUT,
    ),
    "an empty answer": ({**PAIR, "rejected": " "}, EMPTY),
    "a long prompt": ({**PAIR, "prompt": "z" * 90}, NO_ROOM),
    "a tie": ({**PAIR, "score_chosen": 5, "score_rejected": 5.0}, TIE),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_pair_without_a_preference_is_left_out_and_counted(
    trap: str, write: Any, plain: Any
) -> None:
    row, reason = TRAPS[trap]
    data = build(write([PAIR, row]), plain)
    assert data.report.dropped[reason].places == ["d.jsonl:2"]
    assert (data.report.kept, len(data.examples)) == (1, 2)
    assert reason in data.report.text()
    alone = fault_of(lambda: build(write([row]), plain))
    assert reason in str(alone.got) or "chosen and rejected" in alone.what


def test_long_pairs_are_left_out_where_nothing_may_be_cut(
    write: Any, plain: Any
) -> None:
    rows = [PAIR, {**PAIR, "rejected": "z" * 90}]
    data = build(write(rows), plain, overlong="drop")
    assert data.report.dropped[TOO_LONG].count == 1 and data.report.kept == 1


def test_scores_that_say_the_opposite_are_told(write: Any, plain: Any) -> None:
    rows = [{**PAIR, "chosen_rating": 1, "rejected_rating": 4}]
    report = build(write(rows), plain).report
    assert any("higher score" in warning for warning in report.warnings)
    rows[0]["chosen_rating"] = float("nan")
    assert "chosen_rating" in fault_of(lambda: build(write(rows), plain)).what


REFUSED = {
    "other prompts": (
        {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "p"}, BAD]},
        "different prompts",
    ),
    "rules on one side": (
        {"chosen": [RULES, USER, GOOD], "rejected": [USER, BAD]},
        "only one side of a pair has a system message",
    ),
    "two users": (
        {"prompt": [USER, USER], "chosen": [GOOD], "rejected": [BAD]},
        "out of order",
    ),
    "no user": ({"chosen": [GOOD], "rejected": [BAD]}, "out of order"),
    "rules in the middle": (
        {"prompt": [USER, RULES], "chosen": [GOOD], "rejected": [BAD]},
        "out of order",
    ),
    "an unknown role": (
        {"prompt": [USER], "chosen": [{**GOOD, "role": "bot"}], "rejected": [BAD]},
        "different prompts",
    ),
    "text and messages": (
        {"prompt": "q", "chosen": "good", "rejected": [BAD]},
        "must both be text",
    ),
    "no pair": ({"prompt": "q", "completion": "good"}, "needs pairs"),
    "a number": ({"prompt": "q", "chosen": 3, "rejected": "bad"}, "wrong type"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_a_row_that_is_no_pair_is_named(form: str, write: Any, chatml: Any) -> None:
    row, what = REFUSED[form]
    fault = fault_of(lambda: build(write([row]), chatml))
    assert what in fault.what and str(fault.where).startswith("d.jsonl:1")
    good = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    report = build(write([good, row]), chatml, on_bad_row="skip").report
    assert (report.kept, report.skipped_rows) == (1, 1)


def test_pairs_are_counted_as_pairs(write: Any, plain: Any) -> None:
    """Answers may come twice; a pair that does is a duplicate, or was held out."""
    again = {**PAIR, "rejected": " worse"}
    data = build(write([PAIR, again, PAIR]), plain)
    assert (data.report.duplicates, len(data.hashes)) == (1, 3)
    held_out = build(write([again, {**PAIR, "chosen": " best"}]), plain, use="eval")
    assert note_overlap(data, held_out) == 1


def test_answers_that_are_rated_both_ways_are_told(write: Any, plain: Any) -> None:
    rows = [PAIR, {**PAIR, "chosen": " bad", "rejected": " worse"}]
    warnings = build(write(rows), plain, "rated").report.warnings
    assert "answers that are rated both good and bad: 1" in warnings


def test_good_answers_alone_can_be_measured_but_not_trained_on(
    write: Any, plain: Any
) -> None:
    path = write([RATED["prompt/completion"]])
    assert build(path, plain, "rated", use="eval").values["label"].tolist() == [1]
    assert "nothing to tell apart" in fault_of(lambda: build(path, plain, "rated")).what


def test_answers_that_are_rated_are_not_imitated(write: Any, plain: Any) -> None:
    for reads in ("answers", "mixed"):
        row = {"instruction": "q", "output": "bad", "kto_tag": False}
        fault = fault_of(lambda row=row, reads=reads: build(write([row]), plain, reads))
        assert "`kto_tag`" in fault.what and "configs/kto.py" in str(fault.fix)


def test_a_stream_of_all_kinds_says_what_each_is(write: Any, plain: Any) -> None:
    rows = [PAIR, {"prompt": "q:", "completion": " a"}, {"text": "words"}, PAIR]
    data = build(write(rows), plain, "mixed")
    assert data.groups == [(0, 1), (2,), (3,), (4, 5)]
    found = [data.values[kind].tolist() for kind in ("pair", "answer", "text")]
    assert found == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]
    made = Loader(data, length=64, packing=True, seed=0, shuffle=False)
    batch = made.batch(0, made.rows_per_epoch)
    ids = {int(x) for x in np.unique(batch["segments"])}
    assert ids == {0, 1, 2, 3, 5, 7, 8}  # members of group u: 2 u + 1 and 2 u + 2


@pytest.mark.parametrize("reads", ["pairs", "rated"])
def test_the_answers_beside_samples_are_good_ones(
    reads: str, write: Any, plain: Any
) -> None:
    rows = [{**PAIR, "prompt": f"{n}:"} for n in "abcde"]
    found = pick_prompts(build(write(rows), plain, reads), plain, 4)
    assert [(p.text, p.reference) for p in found] == [(f"{n}:", "good") for n in "abcd"]


def test_both_sides_are_shown(write: Any, plain: Any) -> None:
    text = show_group(build(write([PAIR]), plain), 0, plain)
    assert text.startswith("chosen, d.jsonl:1") and "\nrejected, d.jsonl:1" in text
    assert "q:[[ good</s>]]" in text and "q:[[ bad</s>]]" in text
    rated = build(write([PAIR]), plain, "rated")
    assert show_group(rated, 1, plain).startswith("bad, d.jsonl:1")
