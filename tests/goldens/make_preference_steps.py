"""Makes preference_steps.json: three AdamW steps of DPO and ORPO, by torch and PEFT.

Run by hand, from the root of the repository, in an environment that has them:

    python -m tests.goldens.make_preference_steps

Model, optimizer and LoRA are those of `make_steps`. The losses are TRL's, of each
sequence by itself: DPO's reference is the model before the first step; ORPO's
likelihood is over prompt and chosen answer, its odds ratio of means per token.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.goldens import make_steps

OUT = Path(__file__).parent / "preference_steps.json"
BETA = 0.3
Ids = list[int]


def pairs() -> list[tuple[Ids, Ids, Ids]]:
    """(prompt, chosen, rejected) of each pair, of unequal lengths."""
    sizes = ((5, 9, 4), (2, 3, 12), (8, 6, 6), (1, 10, 2), (4, 2, 3))
    return [
        tuple(ids(size, 11 * i + 17 * j) for j, size in enumerate(row))  # type: ignore[misc]
        for i, row in enumerate(sizes)
    ]


def ids(size: int, shift: int) -> Ids:
    return [(5 * i * i + 7 * i + shift + 1) % 64 for i in range(size)]


def token_logps(model: Any, prompt: Ids, answer: Ids) -> Any:
    """log p of every token after the first."""
    import torch

    tokens = torch.tensor([prompt + answer])
    logp = torch.log_softmax(model(tokens).logits[0, :-1], dim=-1)
    return logp.gather(-1, tokens[0, 1:, None])[:, 0]


def answer_logps(model: Any) -> list[tuple[Any, Any]]:
    """Of each pair, log p of the tokens of both answers."""
    return [
        tuple(token_logps(model, prompt, x)[len(prompt) - 1 :] for x in both)  # type: ignore[misc]
        for prompt, *both in pairs()
    ]


def dpo(model: Any) -> Callable[[Any], Any]:
    """The mean of -log s(beta (log ratio of chosen - log ratio of rejected))."""
    import torch

    with torch.no_grad():
        before = [[x.sum() for x in both] for both in answer_logps(model)]

    def loss(model: Any) -> Any:
        deltas = [
            (chosen.sum() - a) - (rejected.sum() - b)
            for (chosen, rejected), (a, b) in zip(
                answer_logps(model), before, strict=True
            )
        ]
        return -torch.nn.functional.logsigmoid(BETA * torch.stack(deltas)).mean()

    return loss


def orpo(model: Any) -> Callable[[Any], Any]:
    """NLL per token - beta times the mean of log s(log odds ratio)."""
    import torch

    del model

    def log_odds(tokens: Any) -> Any:
        mean = tokens.mean()
        return mean - torch.log1p(-torch.exp(mean))

    def loss(model: Any) -> Any:
        whole = [token_logps(model, prompt, chosen) for prompt, chosen, _ in pairs()]
        nll = -torch.cat(whole).mean()
        odds = [log_odds(a) - log_odds(b) for a, b in answer_logps(model)]
        prefer = torch.nn.functional.logsigmoid(torch.stack(odds)).mean()
        return nll - BETA * prefer

    return loss


def run(task: Callable[[Any], Callable[[Any], Any]], method: str) -> dict[str, Any]:
    model = make_steps.build(method)
    return make_steps.run(model, task(model))


def main() -> None:
    """Writes both tasks, by both methods."""
    import peft
    import torch
    import transformers

    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}"
    )
    methods = ("full", "lora")
    tasks = {
        task.__name__: {method: run(task, method) for method in methods}
        for task in (dpo, orpo)
    }
    OUT.write_text(json.dumps({"made_with": versions, "tasks": tasks}, indent=1) + "\n")
    print(versions, {name: found["lora"]["loss"] for name, found in tasks.items()})


if __name__ == "__main__":
    main()
