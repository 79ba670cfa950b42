"""The objectives of answers that are given, in torch, written from their formulas.

Of each sequence by itself: nothing is padded or packed, and nothing is ftjax's. A task
looks at the model before the first step and gives its loss, a function of the model as
it is by then.
"""

from collections.abc import Callable
from typing import Any

from tests.goldens import make_steps
from tests.goldens.objective_data import MARGINS, SETTINGS, Ids, pairs, rated
from tests.goldens.weights import random_tensor

Loss = Callable[[Any], Any]


def logits_of(model: Any, prompt: Ids, answer: Ids) -> Any:
    """The logits of every token after the first."""
    import torch

    return model(torch.tensor([prompt + answer])).logits[0, :-1]


def token_logps(model: Any, prompt: Ids, answer: Ids, temperature: float = 1.0) -> Any:
    """log p of every token after the first."""
    import torch

    targets = torch.tensor((prompt + answer)[1:])
    logits = logits_of(model, prompt, answer) / temperature
    return torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None])[:, 0]


def answer_logps(model: Any, prompt: Ids, answer: Ids, temperature: float = 1.0) -> Any:
    """log p of every token of the answer."""
    return token_logps(model, prompt, answer, temperature)[len(prompt) - 1 :]


def pair_logps(model: Any) -> list[tuple[Any, Any]]:
    """Of each pair, log p of the tokens of both answers."""
    return [
        (answer_logps(model, prompt, chosen), answer_logps(model, prompt, rejected))
        for prompt, chosen, rejected in pairs()
    ]


def add_head(model: Any, name: str) -> None:
    """A linear layer from the last hidden states to one number, with known weights."""
    import torch

    head = torch.nn.Linear(make_steps.CONFIG["hidden_size"], 1, bias=False)
    value = random_tensor(f"{name}.weight", tuple(head.weight.shape))
    head.weight.data = torch.from_numpy(value)
    model.add_module(name, head)


def read_head(model: Any, name: str, tokens: Ids) -> Any:
    """The number of every position."""
    import torch

    found = model(torch.tensor([tokens]), output_hidden_states=True)
    return getattr(model, name)(found.hidden_states[-1])[0, :, 0]


def dpo(model: Any) -> Loss:
    """The mean of -log s(beta (log ratio of chosen - log ratio of rejected)).

    As TRL has it; the reference is the model before the first step.
    """
    import torch

    beta = SETTINGS["dpo"]["beta"]
    with torch.no_grad():
        before = [[x.sum() for x in both] for both in pair_logps(model)]

    def loss(model: Any) -> Any:
        deltas = [
            (chosen.sum() - a) - (rejected.sum() - b)
            for (chosen, rejected), (a, b) in zip(
                pair_logps(model), before, strict=True
            )
        ]
        return -torch.nn.functional.logsigmoid(beta * torch.stack(deltas)).mean()

    return loss


def orpo(model: Any) -> Loss:
    """NLL per token - beta times the mean of log s(log odds ratio).

    As TRL has it: the likelihood is over prompt and chosen answer, the odds ratio of
    means per token.
    """
    import torch

    del model
    beta = SETTINGS["orpo"]["beta"]

    def log_odds(tokens: Any) -> Any:
        mean = tokens.mean()
        return mean - torch.log1p(-torch.exp(mean))

    def loss(model: Any) -> Any:
        whole = [token_logps(model, prompt, chosen) for prompt, chosen, _ in pairs()]
        nll = -torch.cat(whole).mean()
        odds = [log_odds(a) - log_odds(b) for a, b in pair_logps(model)]
        prefer = torch.nn.functional.logsigmoid(torch.stack(odds)).mean()
        return nll - beta * prefer

    return loss


def cpo(model: Any) -> Loss:
    """The mean of -(1 - eps) log s(beta d) - eps log s(-beta d), and w times the NLL.

    As TRL has it: d is of sums, the NLL per token of the chosen answers alone.
    """
    import torch

    del model
    o = SETTINGS["cpo"]
    eps = o["label_smoothing"]

    def loss(model: Any) -> Any:
        both = pair_logps(model)
        u = o["beta"] * torch.stack([a.sum() - b.sum() for a, b in both])
        right, wrong = (torch.nn.functional.logsigmoid(x) for x in (u, -u))
        nll = -torch.cat([chosen for chosen, _ in both]).mean()
        return -((1 - eps) * right + eps * wrong).mean() + o["nll_weight"] * nll

    return loss


def simpo(model: Any) -> Loss:
    """The mean of -log s(beta (mean log p of chosen - of rejected) - gamma).

    As the paper has it; beta is 2.
    """
    import torch

    del model

    def loss(model: Any) -> Any:
        deltas = torch.stack([a.mean() - b.mean() for a, b in pair_logps(model)])
        u = 2.0 * deltas - SETTINGS["simpo"]["gamma"]
        return -torch.nn.functional.logsigmoid(u).mean()

    return loss


def reward(model: Any) -> Loss:
    """The mean of -log s(r_chosen - r_rejected - margin) + center (their sum)^2.

    As TRL has it: r is read at the last token, and there is no head of logits.
    """
    import torch

    add_head(model, "score")
    model.get_output_embeddings().requires_grad_(False)
    center = SETTINGS["reward"]["center"]

    def loss(model: Any) -> Any:
        total = 0.0
        for (prompt, *answers), margin in zip(pairs(), MARGINS, strict=True):
            a, b = (read_head(model, "score", prompt + x)[-1] for x in answers)
            total -= torch.nn.functional.logsigmoid(a - b - margin)
            total += center * (a + b) ** 2
        return total / len(MARGINS)

    return loss


def kto(model: Any) -> Loss:
    """The mean of l_D (1 - s(beta (x - z0))) and l_U (1 - s(beta (z0 - x))).

    As TRL has it: x is the log ratio of an answer, z0 the mean of those of answers to
    other prompts, at least 0. Here each prompt gets the answer of the next row whose
    prompt is another one; TRL takes the row before, whatever its prompt.
    """
    import torch

    o, rows = SETTINGS["kto"], rated()
    others = []
    for i, (prompt, _, _) in enumerate(rows):
        later = rows[i + 1 :] + rows[:i]
        others.append(next(answer for p, answer, _ in later if p != prompt))

    def sums(model: Any) -> tuple[Any, Any]:
        own = [answer_logps(model, p, answer).sum() for p, answer, _ in rows]
        wrong = [
            answer_logps(model, p, answer).sum()
            for (p, _, _), answer in zip(rows, others, strict=True)
        ]
        return torch.stack(own), torch.stack(wrong)

    with torch.no_grad():
        own_before, wrong_before = sums(model)

    def loss(model: Any) -> Any:
        own, wrong = sums(model)
        z0 = (wrong - wrong_before).mean().clamp(min=0).detach()
        total = 0.0
        for x, (_, _, good) in zip(own - own_before, rows, strict=True):
            gain = o["beta"] * (x - z0 if good else z0 - x)
            weight = o["desirable_weight" if good else "undesirable_weight"]
            total += weight * (1 - torch.sigmoid(gain))
        return total / len(rows)

    return loss


def distill(model: Any) -> Loss:
    """(1 - w) (beta KL(t, m) + (1 - beta) KL(s, m)) + w NLL, per token of the answers.

    m = beta t + (1 - beta) s: the divergence is as TRL has it, at the temperature; the
    NLL is at 1.
    """
    import torch

    del model
    o = SETTINGS["distill"]
    beta, w, teacher = o["beta"], o["nll_weight"], make_steps.build("full", "teacher.")

    def loss(model: Any) -> Any:
        apart, nll = [], []
        for tokens, size in make_steps.rows():
            both = tokens[:size], tokens[size:]
            with torch.no_grad():
                told = logits_of(teacher, *both)[size - 1 :]
            said = logits_of(model, *both)[size - 1 :]
            t, s = (torch.softmax(x / o["temperature"], -1) for x in (told, said))
            m = beta * t + (1 - beta) * s
            of_teacher = (t * (t / m).log()).sum(-1)
            of_student = (s * (s / m).log()).sum(-1)
            apart.append(beta * of_teacher + (1 - beta) * of_student)
            nll.append(-answer_logps(model, *both))
        return (1 - w) * torch.cat(apart).mean() + w * torch.cat(nll).mean()

    return loss
