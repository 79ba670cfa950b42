"""Real tokenizers and real data, read in place."""

import pytest

from ftjax.data.dataset import build_dataset
from ftjax.data.schema import Conversation
from ftjax.data.show import show_example
from ftjax.data.tokenizer import load_tokenizer
from tests.data.conftest import chat_row, data_config, example_of, fault_of

WITH_TEMPLATE = ("qwen3", "mistral-v3", "minimind")
ALL = (*WITH_TEMPLATE, "gpt2", "stories260K")
TALK = chat_row("What is 2 + 2?", "It is 4.", "\u00e9\U0001f642?", "No.")["messages"]


@pytest.fixture(scope="module")
def real(shared):
    folders = {n: shared / "tokenizers" / n for n in ALL[:-1]}
    folders["stories260K"] = shared / "models" / "stories260K"
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_chats_are_written_as_transformers_writes_them(real, name):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(real[name].path))
    for messages in (TALK, TALK[:2], [{"role": "system", "content": "Be."}, *TALK[:2]]):
        for prompt in (False, True):
            expected = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            assert real[name].render(messages, prompt) == expected


@pytest.mark.parametrize("name", ALL)
def test_texts_are_encoded_as_transformers_encodes_them(real, name):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(real[name].path))
    texts = ["Hello  world", " once upon", "caf\u00e9 \U0001f642\n\tx = 1", ""]
    for special in (True, False):
        ours = real[name].encode(texts, special)
        assert ours == theirs(texts, add_special_tokens=special)["input_ids"]


ANSWERS = {
    "qwen3": ["It is 4.<|im_end|>", "<think>\n\n</think>\n\nNo.<|im_end|>"],
    "minimind": ["It is 4.<|im_end|>", "No.<|im_end|>"],
    "mistral-v3": ["It is 4.</s>", "No.</s>"],
}


@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_every_answer_is_trained_with_its_end(real, name):
    example = example_of(Conversation(TALK, "d:1"), real[name])
    parts = show_example(example, real[name], colour=False).split("[[")[1:]
    assert [part.partition("]]")[0].strip() for part in parts] == ANSWERS[name]


def test_a_template_that_moves_the_system_message_is_found_out(real):
    # This one writes it before the last question, wherever that is.
    talk = [{"role": "system", "content": "Be kind."}, *TALK]
    error = fault_of(lambda: example_of(Conversation(talk, "d:1"), real["mistral-v3"]))
    assert "reorders" in error.what


@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_real_conversations(real, shared, name):
    data = build(shared / "data/sft/gsm8k_eval.jsonl", real[name])
    assert data.report.kept == 200 and not data.report.warnings
    end = real[name].eos_id
    for example in data.examples:
        last = example.ids[example.trained][-1]
        assert last == end or example.lost


@pytest.mark.parametrize("name", ALL)
def test_real_pairs(real, shared, name):
    data = build(shared / "data/sft/tinystories_continue_eval.jsonl", real[name])
    assert data.report.kept == 100
    assert not [w for w in data.report.warnings if "border" in w]


def test_real_texts(real, shared):
    data = build(shared / "data/text/tinystories_eval.txt", real["stories260K"])
    assert data.report.kept == 100
    assert all(e.ids[0] == 1 and e.trained[1:].all() for e in data.examples)


def build(path, tokenizer):
    config = data_config(max_length=512)
    size = tokenizer.vocab_size
    return build_dataset(str(path), tokenizer, config, vocab_size=size, split="train")
