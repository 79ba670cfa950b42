"""Tiny tokenizers and data files, made on the spot."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftjax.data.encode import Example, encode
from ftjax.data.tokenizer import Tokenizer, load_tokenizer
from ftjax.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXT = ["the answer is here and the question is there, so the answer is good"] * 20


def write_tokenizer(
    folder: Path,
    *,
    template: Any = "",
    add_bos: bool = False,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = None,
    **extra: Any,
) -> Path:
    """Writes a byte-level BPE tokenizer of some 300 ids in the Hugging Face layout."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(TEXT, trainer)
    if add_bos:
        fast.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **extra}
    for name, token in (("bos_token", bos), ("eos_token", eos), ("pad_token", pad)):
        if token is not None:
            config[name] = token
    if template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def example_of(sample, tokenizer, **options):
    """A sample, encoded, which must not be dropped."""
    example = encode(sample, tokenizer, **{"max_length": 500, **options})
    assert isinstance(example, Example)
    return example


def fault_of(call):
    """The UserError that a call ends in."""
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.code == 2
    return caught.value


@pytest.fixture
def make_tokenizer(tmp_path: Path) -> Callable[..., Tokenizer]:
    """Loads a tokenizer written with the given settings."""

    def make(**settings: Any) -> Tokenizer:
        return load_tokenizer(write_tokenizer(tmp_path / "tokenizer", **settings))

    return make


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Without a template; adds nothing by itself."""
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("t") / "plain"))


@pytest.fixture(scope="session")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With a ChatML template without generation markers."""
    folder = tmp_path_factory.mktemp("t") / "chatml"
    return load_tokenizer(write_tokenizer(folder, template=CHATML))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON lines (or bytes as they are) and returns the path."""

    def write_file(rows: list[Any] | bytes, name: str = "d.jsonl") -> str:
        path = tmp_path / name
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_file


def data_config(**changes: Any) -> SimpleNamespace:
    """The `data` section of a config."""
    settings = {
        "max_length": 64,
        "overlong": "truncate",
        "separator": "",
        "join": False,
        "completion_only": True,
        "on_bad_row": "error",
        "empty_completion": "drop",
        "eval_rows": 0,
        "split": "train",
    }
    return SimpleNamespace(**{**settings, **changes})


def chat_row(*contents: str) -> dict[str, Any]:
    """A conversation of user and assistant in turns."""
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[i % 2], "content": c} for i, c in enumerate(contents)
        ]
    }
