"""The objectives of answers that were sampled, in torch; see `torch_offline`.

The policy that sampled and the reference are near the first model, so that no ratio is
1 even in the first step.
"""

from typing import Any

from tests.goldens.objective_data import GROUP, REWARDS, SETTINGS, noise, sampled
from tests.goldens.torch_offline import Loss, add_head, answer_logps, read_head

LOW = 0.2  # of every clip whose setting is the config's
LAMBDA = 0.95


def noisy(name: str, before: list[Any]) -> list[Any]:
    """What `name` said of each answer: near what the first model says."""
    import torch

    return [x + torch.from_numpy(noise(name, i, len(x))) for i, x in enumerate(before)]


def sampled_logps(model: Any, o: dict[str, Any]) -> list[Any]:
    """log p of the tokens of each answer, at the temperature of sampling."""
    return [answer_logps(model, *both, o["temperature"]) for both in sampled()]


def surrogate(logp: Any, old: Any, advantage: Any, o: dict[str, Any]) -> Any:
    """-min(rho A, clip(rho) A) of each token."""
    import torch

    rho = torch.exp(logp - old)
    near = rho.clamp(1 - LOW, 1 + o["clip_high"])
    return -torch.minimum(rho * advantage, near * advantage)


def grpo(model: Any) -> Loss:
    """The mean over all tokens of the clipped surrogate + beta k3 to the reference.

    As TRL has it ('dapo'); A is (R - mean) / (std + 1e-4) of the answers to a prompt.
    """
    import torch

    o = SETTINGS["grpo"]
    with torch.no_grad():
        before = sampled_logps(model, o)
    old, reference = noisy("old", before), noisy("reference", before)
    R = torch.tensor(REWARDS).reshape(-1, GROUP)
    A = (R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-4)

    def loss(model: Any) -> Any:
        told = zip(sampled_logps(model, o), old, reference, A.flatten(), strict=True)
        each = []
        for logp, was, ref, advantage in told:
            k3 = torch.exp(ref - logp) - (ref - logp) - 1
            each.append(surrogate(logp, was, advantage, o) + o["beta"] * k3)
        return torch.cat(each).mean()

    return loss


def advantages(reward: Any, value: Any, gamma: float) -> Any:
    """Generalized advantage estimation of one answer, from its end."""
    import torch

    found, later, after = [], 0.0, 0.0
    for r, v in zip(reward.flip(0), value.flip(0), strict=True):
        later = r + gamma * after - v + gamma * LAMBDA * later
        found.append(later)
        after = v
    return torch.stack(found[::-1])


def ppo(model: Any) -> Loss:
    """The mean over tokens of the clipped surrogate + w of the clipped loss of values.

    As in TRL 1.10: a token pays beta (log p_old - log p_ref), the last one earns the
    reward; returns are advantages + old values, and advantages are whitened then.
    """
    import torch

    add_head(model, "value")
    o = SETTINGS["ppo"]

    def values(model: Any) -> list[Any]:
        return [
            read_head(model, "value", prompt + answer)[len(prompt) - 1 : -1]
            for prompt, answer in sampled()
        ]

    with torch.no_grad():
        before = sampled_logps(model, o)
        old_values = noisy("value", values(model))
    old, reference = noisy("old", before), noisy("reference", before)
    A, goals = [], []
    for was, ref, value, score in zip(old, reference, old_values, REWARDS, strict=True):
        earned = -o["beta"] * (was - ref)
        earned[-1] += score
        A.append(advantages(earned, value, o["gamma"]))
        goals.append(A[-1] + value)
    mean, variance = torch.cat(A).mean(), torch.cat(A).var()
    A = [(x - mean) / torch.sqrt(variance + 1e-8) for x in A]

    def loss(model: Any) -> Any:
        now = (sampled_logps(model, o), values(model))
        gains, errors = [], []
        for logp, value, was, had, advantage, goal in zip(
            *now, old, old_values, A, goals, strict=True
        ):
            gains.append(surrogate(logp, was, advantage, o))
            near = torch.minimum(torch.maximum(value, had - LOW), had + LOW)
            errors.append(torch.maximum((value - goal) ** 2, (near - goal) ** 2) / 2)
        return torch.cat(gains).mean() + o["value_weight"] * torch.cat(errors).mean()

    return loss
