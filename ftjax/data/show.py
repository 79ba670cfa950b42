"""One example as the model sees it, the trained tokens marked."""

import os
import sys

import numpy as np

from ftjax.data.dataset import Dataset
from ftjax.data.encode import Example
from ftjax.data.tokenizer import Tokenizer
from ftjax.data.words import visible

GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def show_example(
    example: Example, tokenizer: Tokenizer, *, colour: bool | None = None
) -> str:
    """The text of an example with what is trained on in green, special tokens included.

    Args:
      example: what to show.
      tokenizer: decodes it.
      colour: whether to use colours; None: if standard output is a terminal that wants
        them. Without colours trained tokens stand in [[double brackets]].
    """
    if colour is None:
        colour = (
            sys.stdout.isatty()
            and "NO_COLOR" not in os.environ
            and os.environ.get("TERM") != "dumb"
        )
    pieces = []
    for text, trained in _runs(example, tokenizer):
        safe = visible(text)
        if not colour:
            pieces.append(f"[[{safe}]]" if trained else safe)
        else:
            pieces.append(f"{GREEN if trained else DIM}{safe}{RESET}")
    count = f"{len(example.ids):,} tokens, {int(example.trained.sum()):,} trained on"
    cut = ", cut" if example.lost else ""
    if example.weights is not None:
        used = np.unique(example.weights[example.trained])
        cut += f", weights {', '.join(f'{w:g}' for w in used[:5])}"
    return f"{visible(example.where)}: {count}{cut}\n{''.join(pieces)}"


def show_group(data: Dataset, group: int, tokenizer: Tokenizer) -> str:
    """An example, or both sides of a pair, or an answer and its rating."""
    members = [data.examples[i] for i in data.groups[group]]
    names = [""] * len(members)
    if "label" in data.values:
        # The other member is the prompt with an answer to another one.
        good = bool(data.values["label"][group])
        members, names = members[:1], ["good" if good else "bad"]
    elif len(members) == 2:
        names = ["chosen", "rejected"]
    shown = [show_example(example, tokenizer) for example in members]
    lines = zip(names, shown, strict=True)
    return "\n".join(f"{name}, {x}\n" if name else f"{x}\n" for name, x in lines)


def _runs(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """(text, whether trained) of each run of equally marked tokens."""
    edges = np.flatnonzero(np.diff(example.trained)) + 1
    ids, runs, shown = example.ids.tolist(), list[tuple[str, bool]](), 0
    for start, end in zip([0, *edges], [*edges, len(ids)], strict=True):
        # The text of everything so far: a run alone would lose its first space.
        text = tokenizer.decode(ids[:end], skip_special=False)
        runs.append((text[shown:], bool(example.trained[start])))
        shown = len(text)
    return runs
