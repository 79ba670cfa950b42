"""The rules of conversations, and what of their rendering is trained on."""

import pytest

from ftjax.data import chat
from ftjax.data.schema import Conversation
from ftjax.data.show import show_example
from ftjax.errors import UserError
from tests.data.conftest import CHATML, MARKED, chat_row, example_of, fault_of


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


U, A, S = ("user", "hi"), ("assistant", "yo"), ("system", "be")


@pytest.mark.parametrize(
    "messages, place, rule",
    [
        (turns(A), 0, "`user` must come first"),
        (turns(U, U, A), 1, "`assistant` must come after `user`"),
        (turns(U, A, A), 2, "`user` must come after `assistant`"),
        (turns(U, S, A), 1, "a system message may only be the first"),
        (turns(U, A, U), 2, "the last message must be the assistant's"),
        (turns(S), 0, "the last message must be the assistant's"),
        (turns(U, ("alien", "x")), 1, "`system`, `user` or `assistant`"),
    ],
)
def test_a_broken_rule_names_the_message(messages, place, rule):
    error = fault_of(lambda: chat.check(messages, "d.jsonl:7", "messages"))
    assert error.where == f"d.jsonl:7, message {place}"
    assert error.expected == rule


@pytest.mark.parametrize(
    "message, what",
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, "text only"),
        (
            {"role": "assistant", "content": "", "tool_calls": [{}]},
            "`tool_calls`: text",
        ),
        ({"role": "tool", "content": "a"}, "`tool`: text only"),
        ({"role": "user", "content": None}, "wrong type"),
        ({"role": "user"}, "wrong type"),
        ({"content": "a"}, "unknown role"),
        ("hi", "not an object"),
    ],
)
def test_only_plain_text_messages(message, what):
    error = fault_of(lambda: chat.check([*turns(U), message], "d.jsonl:7", "messages"))
    assert what in error.what
    assert error.where == "d.jsonl:7, message 1"


def test_no_messages():
    with pytest.raises(UserError, match="empty"):
        chat.check([], "d.jsonl:7", "messages")
    with pytest.raises(UserError, match="wrong type"):
        chat.check("hi", "d.jsonl:7", "messages")


def trained_text(tokenizer, messages, **options):
    """The rendering with [[...]] around what is trained on."""
    first = options.pop("train_from", 0)
    sample = Conversation(messages, "d.jsonl:1", first)
    example = example_of(sample, tokenizer, **options)
    shown = show_example(example, tokenizer, colour=False)
    return (
        shown.partition("\n")[2].replace("<|im_start|>", "<").replace("|im_end|>", ">")
    )


TWO = chat_row("q one", "a one", "q two", "a two")["messages"]
EXPECTED = (
    "<user\nq one<>\n<assistant\n[[a one<>]]\n<user\nq two<>\n<assistant\n[[a two<>]]\n"
)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_answer_is_trained_with_its_end_of_turn(make_tokenizer, template):
    tokenizer = make_tokenizer(template=template)
    assert trained_text(tokenizer, TWO) == EXPECTED


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_the_completion_of_a_message_list_is_trained(make_tokenizer, template):
    tokenizer = make_tokenizer(template=template)
    expected = EXPECTED.replace("[[a one<>]]", "a one<>")
    assert trained_text(tokenizer, TWO, train_from=2) == expected


def test_everything_is_trained_on_request(chatml):
    text = trained_text(chatml, TWO, completion_only=False)
    assert text.count("[[") == 1 and text.endswith("]]")


def test_a_generation_block_without_its_end_of_turn_is_extended(make_tokenizer):
    template = MARKED.replace(
        "<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"
    )
    assert trained_text(make_tokenizer(template=template), TWO) == EXPECTED


def test_a_template_that_trims_and_adds_a_thought_to_the_last_turn(make_tokenizer):
    template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and loop.last %}<think>\n</think>\n{% endif %}"
        "{{ m.content | trim }}",
    )
    messages = chat_row("q one", "  a one\n", "q two", "a two ")["messages"]
    text = trained_text(make_tokenizer(template=template), messages)
    expected = EXPECTED.replace("[[a two", "[[<think>\n</think>\na two")
    assert text == expected


@pytest.mark.parametrize(
    "template",
    [
        # Drops all but the last pair.
        CHATML.replace("in messages", "in messages[-2:]"),
        MARKED.replace("in messages", "in messages[-2:]"),
        # Writes the newest first.
        CHATML.replace("in messages", "in messages[::-1]"),
        MARKED.replace("in messages", "in messages[::-1]"),
        # Leaves out the user's words.
        MARKED.replace("{% else %}{{ m.content }}", "{% else %}"),
        # Writes answers twice.
        CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"),
        # Never writes an answer.
        CHATML.replace("{{ m.content }}", "{% if m.role == 'user' %}x{% endif %}"),
        # Puts each prompt elsewhere once an answer follows.
        "{{ messages|length }}" + CHATML,
    ],
)
def test_a_template_that_drops_or_reorders_turns_fails_the_check(
    make_tokenizer, template
):
    error = fault_of(lambda: trained_text(make_tokenizer(template=template), TWO))
    assert "drops, changes or reorders" in error.what
    assert error.where == "d.jsonl:1"
    assert "in:\n" in error.got  # the rendered sample


def test_a_dropped_system_message_fails_the_check(make_tokenizer):
    template = "{% for m in messages if m.role != 'system' %}" + CHATML[24:]
    error = fault_of(
        lambda: trained_text(make_tokenizer(template=template), turns(S, U, A))
    )
    assert "message 0 (system)" in error.got


def test_the_templates_own_complaint_names_the_row(make_tokenizer):
    template = "{{ raise_exception('only cats') }}"
    error = fault_of(lambda: trained_text(make_tokenizer(template=template), TWO))
    assert error.got == "only cats" and error.where == "d.jsonl:1"


def test_no_template_names_the_ways_out(plain):
    error = fault_of(lambda: trained_text(plain, TWO))
    assert "no chat template" in error.what
    assert "data.chat_template" in error.fix
    assert "`prompt` and `completion`" in error.fix


def test_a_prompt_is_encoded_alike_for_training_and_generation(chatml):
    sample = Conversation(TWO, "d.jsonl:1", 2)
    example = example_of(sample, chatml)
    prompt = chatml.encode_chat(TWO[:3])
    assert example.ids[: len(prompt)].tolist() == prompt
    assert example.trained[len(prompt)] and not example.trained[: len(prompt)].any()
