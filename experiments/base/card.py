"""Writes the model card of the base that ships, from the run that made it.

Run it with the Python that trained: the corpus is that interpreter's documentation.

  python -m experiments.base.card --workdir=runs/pretrain
"""

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ftjax.config import data_settings
from ftjax.console import duration
from ftjax.data.dataset import Dataset, build_dataset
from ftjax.data.tokenizer import Tokenizer, load_tokenizer
from ftjax.errors import UserError
from ftjax.metrics import METRICS, SAMPLES, read_rows
from ftjax.report import environment

CARD = """\
---
language: en
license: apache-2.0
library_name: ftjax
pipeline_tag: text-generation
---
# The base that ships with ftjax

A Llama of {parameters:,} parameters ({layers} layers, width {width}, {heads} heads,
{kv} of them for keys and values, feed-forward {ffn}, {vocab:,} tokens, tied
embeddings), stored as {dtype}. ftjax pretrained it from scratch with its own causal
language-model objective on the English that comes with Python: the `pydoc_data` topics
and the docstrings of the standard library. It continues text in the manner of
documentation, and knows little else. It is here so that `make demo` and the tests have
something real to tune; do not ask it for facts.

## How it was made

    {command}

| | |
|---|---|
{facts}

The held-out part is every module whose name hashes there
(`ftjax/data/pydoc_source.py`); no paragraph, and no run of twelve words, is in both
parts. The loss is in nats per token, end of document included; bits per byte count the
same nats over the UTF-8 bytes.

## What it writes

From the run's own samples, at the step of these weights: the beginnings (in bold) are
held out, the rest is the likeliest continuation, cut off after so many tokens.

{samples}
## Tokenizer and chat form

Byte-level BPE of {vocab:,} tokens, trained on the train part: {train_bpt:.2f} bytes per
token there, {eval_bpt:.2f} on the held-out part. `{end}` ends a document and a turn.
The chat template is ChatML with generation markers and no system prompt of its own; the
base has seen no conversation.

## Licences

The weights, the tokenizer and this card: Apache License 2.0. The text they were trained
on is part of Python and is under the Python Software Foundation License Version 2.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=Path("ftjax/base"))
    parser.add_argument("--step", type=int, help="of the weights; default: the best")
    args = parser.parse_args()
    text = card(args.workdir, args.base, args.step)
    (args.base / "README.md").write_text(text, encoding="utf-8")
    print(f"wrote {args.base / 'README.md'}")


def card(workdir: Path, base: Path, step: int | None = None) -> str:
    """The card of the weights in `base`, which `workdir` made.

    Raises:
      UserError: if the run has no evaluation (of that step).
    """
    run = json.loads((workdir / "config.json").read_text())
    model = json.loads((base / "config.json").read_text())
    tokenizer = load_tokenizer(base)
    held_out = _dataset(run, tokenizer, "eval")
    train = _dataset(run, tokenizer, "train")
    chosen = _chosen(workdir, step)
    facts = _facts(run, chosen, read_rows(workdir / METRICS))
    facts |= _corpus(held_out, train, tokenizer, facts["held-out loss"])
    command = "python -m ftjax.train --config=configs/pretrain.py --workdir=RUN"
    rows = [f"| {name} | {_shown(value)} |" for name, value in facts.items()]
    return CARD.format(
        parameters=_parameters(base / "model.safetensors"),
        layers=model["num_hidden_layers"],
        width=model["hidden_size"],
        heads=model["num_attention_heads"],
        kv=model["num_key_value_heads"],
        ffn=model["intermediate_size"],
        vocab=model["vocab_size"],
        dtype=model["dtype"],
        command=command,
        facts="\n".join(rows),
        samples=_samples(workdir, chosen["step"]),
        train_bpt=_bytes(train, tokenizer) / _trained(train),
        eval_bpt=_bytes(held_out, tokenizer) / _trained(held_out),
        end=tokenizer.eos_text,
    )


def _chosen(workdir: Path, step: int | None) -> dict[str, Any]:
    """The evaluation of the weights: of `step`, or the best one."""
    rows = [r for r in read_rows(workdir / METRICS) if r["split"] == "eval"]
    rows = [r for r in rows if step is None or r["step"] == step]
    if not rows:
        raise UserError("this run has no such evaluation", where=workdir / METRICS)
    return min(rows, key=lambda row: row["loss"])


def _facts(
    run: dict[str, Any], chosen: dict[str, Any], metrics: list[dict[str, Any]]
) -> dict[str, Any]:
    train = [
        r for r in metrics if r["split"] == "train" and r["step"] <= chosen["step"]
    ]
    found = environment()
    last = train[-1]
    return {
        "held-out loss": chosen["loss"],
        "held-out perplexity": math.exp(chosen["loss"]),
        "steps": chosen["step"],
        "tokens seen": last.get("tokens"),
        "time": duration(last["time"]) if "time" in last else None,
        "hardware": f"{found['CPU cores']} CPU cores, {found['system']}",
        "seed": run["seed"],
        "learning rate": run["optim"]["lr"],
        "weight decay": run["optim"]["weight_decay"],
        "rows per step": f"{run['train']['batch_size']} x {run['data']['max_length']}",
        "jax, flax": f"{found['jax']}, {found['flax']}",
    }


def _corpus(
    held_out: Dataset, train: Dataset, tokenizer: Tokenizer, loss: float
) -> dict[str, Any]:
    nats = loss * _trained(held_out)
    return {
        "bits per byte, held out": nats / math.log(2) / _bytes(held_out, tokenizer),
        "corpus": f"Python {platform.python_version()}",
        "tokens of the train part": _tokens(train),
        "tokens of the held-out part": _tokens(held_out),
    }


def _dataset(run: dict[str, Any], tokenizer: Tokenizer, split: str) -> Dataset:
    settings = data_settings(ConfigDict(run), run["data"]["max_length"])
    size = tokenizer.vocab_size
    return build_dataset(
        settings[split], tokenizer, settings, vocab_size=size, split=split
    )


def _tokens(dataset: Dataset) -> int:
    return sum(len(example.ids) for example in dataset.examples)


def _trained(dataset: Dataset) -> int:
    return sum(int(np.sum(example.trained)) for example in dataset.examples)


def _bytes(dataset: Dataset, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of what is predicted: all but each document's first token."""
    texts = (tokenizer.decode(example.ids[1:].tolist()) for example in dataset.examples)
    return sum(len(text.encode()) for text in texts)


def _parameters(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return sum(math.prod(shape) for shape in shapes)


def _samples(workdir: Path, step: int) -> str:
    rows = [row for row in read_rows(workdir / SAMPLES) if row["step"] == step]
    return "".join(
        f"> **{' '.join(row['prompt'].split())}** {' '.join(row['text'].split())}\n\n"
        for row in rows
    )


def _shown(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
