"""The chat template that ships, for tokenizers that have none."""

import pytest

from ftjax.data.schema import Conversation
from ftjax.data.show import show_example
from ftjax.data.template import Cut, RowFault
from ftjax.data.tokenizer import PLAIN, load_tokenizer
from tests.data.conftest import chat_row, example_of

TURNS = chat_row("q one", "a one", "q two", "a two")["messages"]
TALK = [{"role": "system", "content": "be"}, *TURNS]
SHOWN = (
    "System:\nbe\n\nUser:\nq one\n\nAssistant:\n[[a one</s>]]\n\n"
    "User:\nq two\n\nAssistant:\n[[a two</s>]]\n\n"
)


@pytest.mark.parametrize("add_bos", [False, True])
def test_answers_and_their_end_are_trained(make_tokenizer, add_bos):
    folder = make_tokenizer(add_bos=add_bos).path
    tokenizer = load_tokenizer(folder, PLAIN)
    example = example_of(Conversation(TALK, "d:1"), tokenizer)
    shown = show_example(example, tokenizer, colour=False).partition("\n")[2]
    assert shown.rstrip() == (("<s>" if add_bos else "") + SHOWN).rstrip()
    asked = tokenizer.encode_chat(TALK[:2])
    assert example.ids[: len(asked)].tolist() == asked
    assert tokenizer.eos_id in tokenizer.eos_ids


def test_its_own_template_gives_way(make_tokenizer):
    folder = make_tokenizer(template="{{ 1 }}").path
    assert load_tokenizer(folder, PLAIN).render(TALK[:2]).startswith("System:\nbe")


def test_other_roles_are_refused(make_tokenizer):
    template = load_tokenizer(make_tokenizer().path, PLAIN).require_template("d:1")
    talk = [{"role": "tool", "content": "x"}]
    [reply] = template.render([(talk, [Cut(1)])])
    assert isinstance(reply, RowFault) and '"tool"' in reply.error


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "models/stories260K"])
def test_transformers_writes_the_same(shared, name):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(shared / name, PLAIN)
    theirs = AutoTokenizer.from_pretrained(str(shared / name))
    for prompt in (False, True):
        talk = TALK[:2] if prompt else TALK
        expected = theirs.apply_chat_template(
            talk,
            chat_template=tokenizer.require_template("d:1").source,
            tokenize=False,
            add_generation_prompt=prompt,
        )
        assert tokenizer.render(talk, prompt) == expected
    # A text of this tokenizer begins as a conversation does.
    first = tokenizer.encode(["a"], add_special=True)[0][0]
    assert (first == tokenizer.bos_id) == tokenizer.render(TALK).startswith("<s>")
