"""Every objective against TRL's own trainers: losses, gradients, logged numbers."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.losses import cpo, dpo, grpo, kto, orpo, policy, reward, token_losses
from ftjax.losses.distill import Model, distill
from ftjax.losses.pairs import Pairs
from ftjax.losses.token_logps import token_logps
from tests.goldens import make_losses as made

GOLDEN = json.loads(made.OUT.read_text())


def held(case: dict[str, Any], f: Any, *leaves: Any) -> None:
    """A loss and its gradients are those of the golden case."""
    small = [jnp.asarray(x, jnp.float32) for x in leaves]
    loss, grads = jax.value_and_grad(f, tuple(range(len(leaves))))(*small)
    assert float(loss) == pytest.approx(case["loss"], rel=2e-6, abs=1e-6)
    for a, b in zip(grads, case["grads"], strict=True):
        np.testing.assert_allclose(a, np.asarray(b), rtol=2e-5, atol=2e-6)


def logged(case: dict[str, Any], found: dict[str, Any]) -> None:
    for name, value in found.items():
        assert float(value) == pytest.approx(case["metrics"][name], abs=2e-6), name


def pairs(tokens: Any, weights: Any = 1.0) -> Pairs:
    """Of token log-probabilities [6, 5], and the golden reference."""
    logps = made.token_logps("policy", made.LENGTHS, made.TOKENS)
    reference = jnp.asarray(made.reference_sums("reference", logps))
    counts = jnp.asarray(logps != 0, jnp.float32)
    sums, lengths = jnp.sum(tokens * counts * weights, 1), jnp.sum(counts, 1)
    given = (sums, reference, lengths)
    (chosen, rejected), (q_c, q_r), (n_c, n_r) = ((x[:3], x[3:]) for x in given)
    return Pairs(chosen, rejected, q_c, q_r, n_c, n_r)


def policy_tokens() -> Any:
    return made.token_logps("policy", made.LENGTHS, made.TOKENS)


@pytest.mark.parametrize("case", [x for x in made.DPO_CASES if x != "ld"])
def test_dpo(case: str) -> None:
    settings = made.DPO_CASES[case]
    weights = settings.get("loss_weights", [1.0])

    def loss(tokens: Any) -> Any:
        total = jnp.zeros(())
        for name, weight in zip(settings["loss_types"], weights, strict=True):
            # TRL reads no label smoothing in this one.
            eps = 0.0 if name == "sigmoid" else made.DPO["label_smoothing"]
            divergence = settings.get("f_divergence_type", "reverse_kl")
            options = dpo.Options(made.DPO["beta"], eps, divergence)
            each = dpo.LOSSES[name](pairs(tokens), options)
            total = total + weight * jnp.mean(each)
        return total

    held(GOLDEN["dpo"][case], loss, policy_tokens())


def test_every_loss_of_trl_has_a_golden() -> None:
    names = {name for case in made.DPO_CASES.values() for name in case["loss_types"]}
    assert names == dpo.LOSSES.keys() - {"ipo_sum"}


def test_ld_dpo() -> None:
    # The golden reference is a sum already: this holds the policy's weights.
    position = np.arange(1, made.TOKENS + 1) * (policy_tokens() != 0)
    shorter = np.minimum(made.LENGTHS[:3], made.LENGTHS[3:])
    shared = np.tile(shorter, 2)[:, None] * np.ones_like(position)
    weights = dpo.length_desensitized(jnp.asarray(position), jnp.asarray(shared), 0.4)

    def loss(tokens: Any) -> Any:
        given = pairs(tokens, weights)
        return jnp.mean(dpo.LOSSES["sigmoid"](given, dpo.Options(made.DPO["beta"])))

    held(GOLDEN["dpo"]["ld"], loss, policy_tokens())


def test_what_dpo_logs() -> None:
    found = dpo.metrics(pairs(jnp.asarray(policy_tokens())), beta=made.DPO["beta"])
    found.pop("rewards/accuracies_fair")
    logged(GOLDEN["dpo"]["sigmoid"], {k: jnp.mean(x) for k, x in found.items()})


@pytest.mark.parametrize("case", ["kto", "kto level", "apo_zero_unpaired"])
def test_kto(case: str) -> None:
    logps, label = policy_tokens(), jnp.asarray(made.LABELS)
    other = made.token_logps("other", made.LENGTHS, made.TOKENS)
    far = made.reference_sums("far", other) - (5 if case == "kto" else -5)
    mismatched = jnp.asarray(other.sum(1) - far, jnp.float32)
    real, beta = jnp.ones(6, bool), made.KTO["beta"]
    z0 = kto.reference_point(mismatched, real)
    reference = jnp.asarray(made.reference_sums("reference", logps))
    numbers = {
        "beta": beta,
        "desirable": made.KTO["desirable_weight"],
        "undesirable": made.KTO["undesirable_weight"],
    }

    def loss(tokens: Any) -> Any:
        ratio = jnp.sum(jnp.where(logps != 0, tokens, 0), 1) - reference
        if case == "apo_zero_unpaired":
            return jnp.mean(kto.apo_zero_unpaired(ratio, label, **numbers))
        return jnp.mean(kto.kto(ratio, label, z0, **numbers))

    held(GOLDEN["kto"][case], loss, logps)
    sums = jnp.asarray(logps.sum(1), jnp.float32)
    found = kto.metrics(sums - reference, sums, label, real, beta=beta)
    means = {k: jnp.sum(x.value * x.weight) / 3 for k, x in found.items()}
    if case != "apo_zero_unpaired":
        means["kl"] = z0
    logged(GOLDEN["kto"][case], means)


def test_orpo() -> None:
    case = GOLDEN["orpo_cpo"]["orpo"]
    held(case, lambda c, r: jnp.mean(orpo.odds_ratio(c, r, beta=0.2)), *made.means())
    found = orpo.metrics(*(jnp.asarray(x) for x in made.means()), beta=0.2)
    for name in ("log_odds_ratio", "log_odds_chosen"):
        assert float(jnp.mean(found[name])) == pytest.approx(case[name], rel=2e-6)


@pytest.mark.parametrize("case", made.CPO_CASES)
def test_cpo(case: str) -> None:
    settings = made.CPO_CASES[case]
    numbers = (made.CPO["beta"], made.CPO["label_smoothing"], made.CPO["simpo_gamma"])
    options = cpo.Options(*numbers, alpha=settings["alpha"])

    def loss(chosen: Any, rejected: Any) -> Any:
        nothing, one = jnp.zeros(3), jnp.ones(3)
        given = Pairs(chosen, rejected, nothing, nothing, one, one)
        return jnp.mean(cpo.LOSSES[settings["loss_type"]](given, options))

    held(GOLDEN["orpo_cpo"][f"cpo {case}"], loss, *made.means())


@pytest.mark.parametrize("case", ["plain", "margin"])
def test_reward(case: str) -> None:
    scores, margins = made.rewards()
    margin = jnp.asarray(margins) if case == "margin" else 0.0
    center = 0.01 if case == "margin" else 0.0

    def loss(x: Any) -> Any:
        return jnp.mean(reward.reward(x[0], x[1], margin=margin, center=center))

    held(GOLDEN["reward"][case], loss, scores)
    given = [jnp.asarray(x, jnp.float32) for x in scores]
    found = {k: jnp.mean(x) for k, x in reward.metrics(*given).items()}
    found.pop("accuracy_fair")
    low, high = reward.extremes(given[0], given[1], jnp.ones(3, bool))
    ends = {"min_reward": low, "max_reward": high}
    logged(GOLDEN["reward"][case], {**found, **ends})


def policies() -> list[Any]:
    """As they were made, the advantages for every token [4, 6]."""
    *rest, advantage = (jnp.asarray(x) for x in made.policies())
    return [*rest, jnp.broadcast_to(advantage[:, None], rest[0].shape)]


@pytest.mark.parametrize("case", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_grpo(case: str) -> None:
    logps, old, reference, advantage = policies()
    clips = {"low": made.GRPO["epsilon_low"], "high": made.GRPO["epsilon_high"]}
    mask = (logps != 0).astype(jnp.float32)
    lengths = jnp.broadcast_to(jnp.sum(mask, 1, keepdims=True), mask.shape)
    tokens = grpo.Tokens(mask, lengths, jnp.asarray(4.0))
    share = grpo.REDUCTIONS[case](tokens, made.GRPO["longest"])

    def loss(x: Any) -> Any:
        beta = made.GRPO["beta"]
        each = grpo.token_loss(x, old, reference, advantage, beta=beta, **clips)
        return jnp.sum(share.token * each) / share.total

    held(GOLDEN["grpo"][case], loss, logps)
    cut = policy.clip_metrics(logps, old, advantage, **clips)
    means = {f"{k}_mean": jnp.sum(x * mask) / jnp.sum(mask) for k, x in cut.items()}
    kl = jnp.sum(policy.k3(logps, reference) * mask) / jnp.sum(mask)
    logged(GOLDEN["grpo"][case], {**means, "kl": kl})


def test_rloo() -> None:
    logps, old, _, advantage = policies()
    clips = {"low": made.GRPO["epsilon_low"], "high": made.GRPO["epsilon_high"]}

    def loss(x: Any) -> Any:
        kept = jnp.where(logps != 0, x, 0)
        sums, before = jnp.sum(kept, 1), jnp.sum(old, 1)
        return jnp.mean(policy.clipped(sums, before, advantage[:, 0], **clips))

    held(GOLDEN["grpo"]["rloo"], loss, logps)


def heads() -> dict[str, Any]:
    given = {name: jnp.asarray(x) for name, x in made.heads().items()}
    given["targets"] = given["targets"].astype(jnp.int32)
    return given


def test_the_chunked_head() -> None:
    given, case = heads(), GOLDEN["head"]["token_logps"]
    others = (given["targets"], given["weights"], 2)

    def found(h: Any, w: Any) -> Any:
        return token_logps(h, w.T, *others, temperature=made.TEMPERATURE)

    def loss(h: Any, w: Any) -> Any:
        return jnp.sum(found(h, w).logp_BT * given["cotangent"])

    held(case, loss, given["h"], given["w"])
    counts = np.asarray(given["weights"]).ravel() != 0
    each = found(given["h"], given["w"])
    for name in ("logp", "entropy", "mean_logit", "correct"):
        ours = np.asarray(getattr(each, f"{name}_BT")).ravel()
        np.testing.assert_allclose(
            ours[counts], np.array(case[name])[counts], rtol=2e-5
        )


def test_label_smoothing() -> None:
    given = heads()

    def loss(h: Any, w: Any) -> Any:
        found = token_logps(h, w.T, given["targets"], given["weights"], 2)
        logps = (found.logp_BT, found.mean_logp_BT)
        each = token_losses.label_smoothed(*logps, label_smoothing=0.1)
        return jnp.sum(each) / jnp.sum(given["weights"])

    held(GOLDEN["head"]["label_smoothed"], loss, given["h"], given["w"])


@pytest.mark.parametrize("name", made.DISTILL)
def test_distillation(name: str) -> None:
    given, case = heads(), GOLDEN["head"][name]
    teacher = Model(given["teacher_h"], given["teacher_w"].T)

    def found(h: Any, w: Any) -> Any:
        return distill(
            Model(h, w.T),
            teacher,
            given["weights"],
            2,
            divergence=name,
            beta=made.DISTILL[name],
            temperature=made.TEMPERATURE,
        )

    def loss(h: Any, w: Any) -> Any:
        return jnp.sum(found(h, w).loss_BT) / jnp.sum(given["weights"])

    held(case, loss, given["h"], given["w"])
    entropy = jnp.sum(found(given["h"], given["w"]).entropy_BT)
    assert float(entropy) == pytest.approx(case["entropy"], rel=2e-6)


def test_dft() -> None:
    logps = policy_tokens()
    count = int((logps != 0).sum())

    def loss(tokens: Any) -> Any:
        each = token_losses.dft(tokens)
        return jnp.sum(jnp.where(logps != 0, each, 0)) / count

    held(GOLDEN["sft"]["dft"], loss, logps)
