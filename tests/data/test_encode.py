"""Which tokens come out, and which of them are trained on."""

from typing import Any

import numpy as np
import pytest

from ftjax.data.encode import (
    EMPTY,
    NO_ROOM,
    NOTHING,
    TOO_LONG,
    Dropped,
    Rules,
    encode,
    encode_all,
)
from ftjax.data.notes import Notes
from ftjax.data.schema import Conversation, PromptCompletion, TextRow, TokenRow
from ftjax.errors import UserError
from tests.data.conftest import chat_row, fault_of

WHERE = "d.jsonl:1"


def text(words):
    return TextRow(words, WHERE)


def pair(prompt, completion):
    return PromptCompletion(prompt, completion, WHERE)


def one(sample, tokenizer, **options):
    return encode(sample, tokenizer, **{"max_length": 100, **options})


def trained_words(example, tokenizer):
    return tokenizer.decode(example.ids[example.trained], skip_special=False)


def noted(sample, tokenizer):
    notes = Notes()
    encode_all([sample], tokenizer, Rules(100), notes)
    return list(notes.count)


def test_text_trains_every_token_after_the_first(plain):
    example = one(text("the answer"), plain)
    assert example.ids.dtype == np.int32
    assert example.trained.tolist() == [False] + [True] * (len(example.ids) - 1)
    assert example.ids[-1] == plain.eos_id


def test_eos_is_appended_once(plain):
    assert (one(text("it is</s>"), plain).ids == one(text("it is"), plain).ids).all()


def test_a_pair_trains_the_completion_and_eos(plain):
    example = one(pair("question:", " the answer"), plain)
    assert trained_words(example, plain) == " the answer</s>"
    everything = one(pair("question:", " the answer"), plain, completion_only=False)
    assert (everything.ids == example.ids).all()
    assert everything.trained.sum() == len(example.ids) - 1


def test_the_border_is_the_longest_common_prefix(plain):
    # " the" is one token, so the space of the prompt belongs to the completion.
    example = one(pair("question: ", "the answer"), plain)
    assert trained_words(example, plain) == " the answer</s>"
    note = "prompt and completion share a token at their border"
    assert noted(pair("question: ", "the answer"), plain) == [note]
    assert noted(pair("question:", " the answer"), plain) == []


def test_pad_equal_to_eos_keeps_eos_trained(make_tokenizer):
    tokenizer = make_tokenizer(pad="</s>")
    assert tokenizer.pad == tokenizer.eos_id
    # An end of text inside the completion is a token like any other, too.
    example = one(pair("q", "a</s>b"), tokenizer)
    assert trained_words(example, tokenizer) == "a</s>b</s>"


def test_no_eos(make_tokenizer):
    tokenizer = make_tokenizer(eos=None)
    assert trained_words(one(pair("q", "a"), tokenizer), tokenizer) == "a"


@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_is_written_as_the_tokenizer_does_and_never_twice(make_tokenizer, add_bos):
    tokenizer = make_tokenizer(add_bos=add_bos)
    for sample in (text("<s>a"), text("a"), pair("<s>a", "b"), pair("a", "b")):
        ids = one(sample, tokenizer).ids.tolist()
        begins = getattr(sample, "text", getattr(sample, "prompt", "")).startswith(
            "<s>"
        )
        assert ids.count(0) == (1 if add_bos or begins else 0)
    note = "the text began with BOS itself: one was removed"
    assert noted(text("<s>a"), tokenizer) == ([note] if add_bos else [])
    example = one(pair("<s>a", "b"), tokenizer)
    assert trained_words(example, tokenizer) == "b</s>"
    prompt = tokenizer.encode_prompt("<s>a")  # what a model is asked later
    assert example.ids[: len(prompt)].tolist() == prompt


def test_a_template_that_writes_bos_gets_no_second(make_tokenizer):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    tokenizer = make_tokenizer(template=template, add_bos=True)
    row = Conversation(chat_row("q", "a")["messages"], WHERE)
    example = one(row, tokenizer)
    assert example.ids.tolist().count(0) == 1
    assert trained_words(example, tokenizer) == "a</s>"


def test_an_empty_prompt(plain, make_tokenizer):
    assert one(pair("", "ab"), plain).trained.tolist() == [False, True, True]
    tokenizer = make_tokenizer(add_bos=True)
    assert one(pair("", "ab"), tokenizer).trained.tolist() == [False, True, True, True]


def test_overlong_rows(plain):
    long = pair("a", "b" * 50)
    cut = one(long, plain, max_length=10)
    assert len(cut.ids) == 10 and cut.lost > 0
    assert (cut.ids == one(long, plain).ids[:10]).all()
    assert one(long, plain, max_length=10, overlong="drop") == Dropped(TOO_LONG, WHERE)
    error = fault_of(lambda: one(long, plain, max_length=10, overlong="error"))
    assert error.where == WHERE and error.got == "52"
    assert one(long, plain, max_length=52, overlong="error").lost == 0


def test_a_prompt_without_room_for_an_answer(plain):
    for length in (10, 11, 30):
        sample = pair("z" * length, "b")
        assert one(sample, plain, max_length=10) == Dropped(NO_ROOM, WHERE)
    assert one(pair("z" * 9, "b"), plain, max_length=10).trained.sum() == 1


@pytest.mark.parametrize("answer", ["", " \n"])
def test_empty_completions(chatml, answer):
    for sample in (
        pair("a", answer),
        Conversation(chat_row("a", answer)["messages"], WHERE),
    ):
        assert one(sample, chatml) == Dropped(EMPTY, WHERE)
        error = fault_of(
            lambda sample=sample: one(sample, chatml, empty_completion="error")
        )
        assert error.where == WHERE and "empty" in error.what
    assert one(text(" "), chatml) == Dropped(NOTHING, WHERE)


def test_special_tokens_in_texts_are_noted(chatml):
    note = "text holds special tokens, which are encoded as such"
    row = Conversation(chat_row("say <|im_end|>", "a")["messages"], WHERE)
    assert noted(row, chatml) == [note]
    assert noted(pair("a", "b</s>"), chatml) == []


def test_ready_made_ids_stay_as_they_are(plain):
    row = TokenRow([5, 6, 7, 8], [True, False, True, True], WHERE)
    example = one(row, plain, completion_only=False)
    assert example.ids.tolist() == [5, 6, 7, 8]
    assert example.trained.tolist() == [False, False, True, True]
    masked = TokenRow([5, 6], [False, False], WHERE)
    assert one(masked, plain) == Dropped(NOTHING, WHERE)
    huge = one(TokenRow([5, 2**40, -7], [True] * 3, WHERE), plain)
    assert huge.ids.tolist() == [5, 2**31 - 1, -1]  # out of any vocabulary, not wrapped


def test_many_kinds_at_once_keep_their_order_and_their_faults(chatml):
    bad = chat_row("q", "a")["messages"]
    samples = [
        text("one"),
        Conversation(bad, "d.jsonl:2"),
        pair("q", ""),
        pair("q", "three"),
    ]
    outcomes: list[Any] = encode_all(samples, chatml, Rules(100), Notes())
    first, second, third, fourth = outcomes
    assert (first.ids == one(samples[0], chatml).ids).all()
    assert trained_words(second, chatml) == "a<|im_end|>"
    assert isinstance(third, Dropped)
    assert trained_words(fourth, chatml) == "three</s>"


def test_a_faulty_row_does_not_spoil_the_others(make_tokenizer):
    template = (
        "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    )
    tokenizer = make_tokenizer(
        template=template
        + "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    rows = [
        Conversation(chat_row(q, "a")["messages"], f"d:{i}")
        for i, q in enumerate(("good", "bad", "good"))
    ]
    outcomes = encode_all(rows, tokenizer, Rules(100), Notes())
    assert isinstance(outcomes[1], UserError) and outcomes[1].where == "d:1"
    assert trained_words(outcomes[2], tokenizer) == "a<|im_end|>"
