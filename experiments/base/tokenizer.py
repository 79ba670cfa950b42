"""Trains the tokenizer of the base that ships, on the train split of `pydocs`.

A byte-level BPE: every text has an encoding and comes back unchanged. The same Python
gives the same file.

  python -m experiments.base.tokenizer --out=ftjax/base
"""

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ftjax.data import pydocs

VOCAB_SIZE = 4096
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
CONTEXT = 1024


def corpus() -> Iterator[str]:
    """The text that the base is trained on, and the questions and answers."""
    for row in pydocs.rows("text", "train"):
        yield row["text"]
    for row in pydocs.rows("instructions", "train"):
        yield from (message["content"] for message in row["messages"])


def train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def bytes_per_token(tokenizer: Tokenizer, split: str) -> float:
    """UTF-8 bytes of the split's text rows per token."""
    texts = [row["text"] for row in pydocs.rows("text", split)]
    encoded = tokenizer.encode_batch(texts)
    return sum(len(t.encode()) for t in texts) / sum(len(e.ids) for e in encoded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("ftjax/base"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train()
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [START],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (out / "tokenizer_config.json").write_text(text)
    report = {
        "vocab_size": tokenizer.get_vocab_size(),
        "bytes_per_token_train": round(bytes_per_token(tokenizer, "train"), 3),
        "bytes_per_token_eval": round(bytes_per_token(tokenizer, "eval"), 3),
        "python": platform.python_version(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
