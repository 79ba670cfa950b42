"""Rows of prompts: what is asked, and what is kept for whoever judges the answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from ftjax.data.dataset import Dataset, build_dataset
from ftjax.data.tokenizer import load_tokenizer
from tests.data.conftest import data_config

RULES = data_config(max_length=40)
ASK = [{"role": "user", "content": "What is the thing?"}]


@pytest.fixture
def build(tiny_llama: Path, tmp_path: Path) -> Any:
    tokenizer = load_tokenizer(tiny_llama)

    def build(*rows: dict[str, Any]) -> tuple[Dataset, Any]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = build_dataset(
            str(path), tokenizer, RULES, vocab_size=512, split="train", reads="prompts"
        )
        return found, tokenizer

    return build


def test_a_prompt_and_its_columns(build: Any) -> None:
    answer = {"role": "assistant", "content": "A re."}
    found, tokenizer = build(
        {"prompt": "the thing", "answer": "4", "extra": [1, None], "completions": 1},
        {"prompt": ASK, "answer": None},
        {"messages": [*ASK, answer], "level": 3},
        {"prompt": "on", "completion": " and"},
        {"prompt": "the thing " * 40},
    )
    assert found.columns == [
        {"prompt": "the thing", "answer": "4", "extra": [1, None]},
        {"prompt": ASK, "answer": None},
        {"prompt": ASK, "level": 3, "completion": "A re."},
        {"prompt": "on", "completion": " and"},
    ]
    plain = [example.ids.tolist() for example in found.examples]
    assert plain[0] == tokenizer.encode_prompt("the thing")
    assert plain[1] == plain[2] == tokenizer.encode_chat(ASK)
    assert not any(example.trained.any() for example in found.examples)
    assert "the prompt alone fills max_length" in found.report.dropped


def test_the_fingerprint_knows_the_columns(build: Any) -> None:
    one, two = (build({"prompt": "a", "answer": x})[0].fingerprint() for x in "45")
    assert one != two == build({"prompt": "a", "answer": "5"})[0].fingerprint()
