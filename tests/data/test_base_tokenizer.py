"""The tokenizer and the chat template of the base that ships."""

import json
from typing import Any

import pytest

from ftjax.data import pydocs
from ftjax.data.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import ROOT

BASE = ROOT / "ftjax" / "base"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does `len` do?"},
    {"role": "assistant", "content": "Return the number of items."},
    {"role": "user", "content": "Of what?"},
    {"role": "assistant", "content": "Of a container."},
]
WRITTEN = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nWhat does `len` do?<|im_end|>\n"
    "<|im_start|>assistant\nReturn the number of items.<|im_end|>\n"
    "<|im_start|>user\nOf what?<|im_end|>\n"
    "<|im_start|>assistant\nOf a container.<|im_end|>\n"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(BASE)


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def read(name: str) -> dict[str, Any]:
    return json.loads((BASE / name).read_text())


def test_sizes_and_special_tokens_agree(tokenizer: Tokenizer) -> None:
    config = read("config.json")
    assert tokenizer.vocab_size == config["vocab_size"] == 4096
    assert tokenizer.special_ids == {0: "<|pad|>", 1: "<|im_start|>", 2: "<|im_end|>"}
    assert tokenizer.eos_id == config["eos_token_id"] == 2
    assert tokenizer.pad == config["pad_token_id"] == 0
    assert tokenizer.bos_id is None
    assert tokenizer.eos_ids == tuple(read("generation_config.json")["eos_token_id"])


@pytest.mark.parametrize(
    "text",
    [
        "Return the number of items in a container.",
        "  two spaces\n\n\ttab \r\n and 1234567890 digits",
        "naïve café — “quoted” 漢字 🎉🏽 עברית",
        "".join(chr(i) for i in range(256)),
        "\ud7ff\ue000\U0010ffff",
    ],
)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    [ids] = tokenizer.encode([text], add_special=True)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids)


def test_every_row_that_ships_comes_back(tokenizer: Tokenizer) -> None:
    texts = [row["text"] for row in pydocs.rows("text", "eval")]
    encoded = tokenizer.encode(texts, add_special=False)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    size = sum(len(text.encode()) for text in texts) / sum(map(len, encoded))
    assert size > 3.2  # bytes per token on text that it was not trained on


def test_the_template_writes_chatml(tokenizer: Tokenizer) -> None:
    assert tokenizer.render(TALK, add_generation_prompt=False) == WRITTEN
    prompt = tokenizer.render(TALK[:2])
    assert WRITTEN.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")


def test_the_template_adds_no_system_prompt(tokenizer: Tokenizer) -> None:
    assert tokenizer.render(TALK[1:2]).startswith("<|im_start|>user\nWhat")


def test_transformers_marks_the_answers_and_their_ends(hugging_face: Any) -> None:
    encoded = hugging_face.apply_chat_template(
        TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    marked = [i for i, mask in pairs if mask]
    told = "Return the number of items.<|im_end|>Of a container.<|im_end|>"
    assert hugging_face.decode(marked) == told


def test_transformers_renders_the_same(hugging_face: Any) -> None:
    assert hugging_face.apply_chat_template(TALK, tokenize=False) == WRITTEN


def test_the_template_refuses_an_unknown_role(hugging_face: Any) -> None:
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match="wizard"):
        hugging_face.apply_chat_template([{"role": "wizard", "content": "Hm."}])


def test_all_that_ships_is_small() -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 8e6
