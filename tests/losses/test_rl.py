"""GRPO, RLOO and PPO: advantages, clipped losses and averages, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.losses import grpo, policy, ppo
from tests.losses.numeric import agree, all_finite

RNG = np.random.default_rng(1)
REWARDS = RNG.standard_normal((3, 4))
ALL = np.ones((3, 4), bool)


def advantages(name: str, rewards: Any, real: Any) -> Any:
    given = jnp.asarray(rewards, jnp.float32), jnp.asarray(real)
    return np.asarray(grpo.ADVANTAGES[name](*given))


def test_advantages_are_their_formulas() -> None:
    away = REWARDS - REWARDS.mean(1, keepdims=True)
    expected = {
        "none": away,
        "group": away / (REWARDS.std(1, ddof=1, keepdims=True) + 1e-4),
        "batch": away / (REWARDS.std(ddof=1) + 1e-4),
        "leave_one_out": REWARDS - (REWARDS.sum(1, keepdims=True) - REWARDS) / 3,
    }
    assert expected.keys() == grpo.ADVANTAGES.keys()
    for name, wanted in expected.items():
        found = advantages(name, REWARDS, ALL)
        np.testing.assert_allclose(found, wanted, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(found.sum(1), 0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", grpo.ADVANTAGES)
def test_what_has_no_reward_counts_nowhere(name: str) -> None:
    real = ALL.copy()
    real[0, 1] = real[2, 1:] = False
    found = advantages(name, np.where(real, REWARDS, 1e9), real)
    assert np.all(found[~real] == 0)
    # One alone has nobody to be better than.
    assert found[2, 0] == 0
    few = advantages(name, REWARDS[:1][real[:1]][None], np.ones((1, 3), bool))
    if name != "batch":
        np.testing.assert_allclose(found[:1][real[:1]], few[0], rtol=1e-5)


def test_equal_rewards_teach_nothing() -> None:
    for name in grpo.ADVANTAGES:
        np.testing.assert_allclose(advantages(name, ALL * 0.5, ALL), 0, atol=1e-6)


def token_args() -> list[Any]:
    logp, old, ref = -2 + RNG.standard_normal((3, 2, 6)) * 0.4
    return [logp, old, ref, RNG.standard_normal((2, 6))]


def test_the_loss_of_a_token_is_its_formula() -> None:
    logp, old, ref, advantage = token_args()

    def reference(p: Any) -> Any:
        rho = np.exp(p - old)
        bounded = np.clip(rho, 0.8, 1.3)
        k3 = np.exp(ref - p) - (ref - p) - 1
        return -np.minimum(rho * advantage, bounded * advantage) + 0.04 * k3

    def loss(p: Any) -> Any:
        others = [jnp.asarray(x, jnp.float32) for x in (old, ref, advantage)]
        return grpo.token_loss(p, *others, beta=0.04, low=0.2, high=0.3)

    agree(loss, reference, [logp])
    rho = np.exp(logp - old)
    assert np.any(rho > 1.3) and np.any(rho < 0.8)
    given = [jnp.asarray(x, jnp.float32) for x in (logp, old, advantage)]
    found = policy.clip_metrics(*given, low=0.2, high=0.3)
    low, high = (rho < 0.8) & (advantage < 0), (rho > 1.3) & (advantage > 0)
    np.testing.assert_array_equal(found["clip_ratio/low"], low)
    np.testing.assert_array_equal(found["clip_ratio/high"], high)
    np.testing.assert_array_equal(found["clip_ratio/region"], low | high)


def test_a_second_bound_holds_where_the_advantage_is_negative() -> None:
    logp = jnp.log(jnp.asarray([5.0, 5.0, 2.0]))
    advantage = jnp.asarray([-1.0, 1.0, -1.0])
    zero = jnp.zeros(3)
    found = policy.clipped(logp, zero, advantage, low=0.2, high=0.2, most=4.0)
    np.testing.assert_allclose(found, [4, -1.2, 2], rtol=1e-6)


def test_the_first_update_has_the_gradient_of_reinforce() -> None:
    logp, _, _, advantage = (jnp.asarray(x, jnp.float32) for x in token_args())

    def total(p: Any) -> Any:
        return jnp.sum(policy.clipped(p, logp, advantage, low=0.2, high=0.2))

    np.testing.assert_allclose(jax.grad(total)(logp), -advantage, rtol=1e-6)


def test_far_ends_are_finite() -> None:
    far, advantage = np.meshgrid([0.0, 1e4, -1e4], [-1.0, 0.0, 1.0])
    others = [jnp.asarray(x, jnp.float32) for x in (0 * far, 0 * far, advantage)]
    all_finite(lambda p: grpo.token_loss(p, *others, beta=0.1), far)


def test_estimates_of_the_kl_are_unbiased_and_k3_is_not_negative() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    given = [jnp.asarray(np.log(x), jnp.float32) for x in (p, q)]
    exact = np.sum(p * np.log(p / q))
    for estimate in (policy.k1, policy.k3):
        assert float(np.sum(p * estimate(*given))) == pytest.approx(exact, rel=1e-5)
    assert np.all(np.asarray(policy.k3(*given)) >= 0)


def test_the_four_averages_of_tokens() -> None:
    losses = RNG.standard_normal((3, 5))
    lengths = np.array([5.0, 2, 0])
    mask = (np.arange(5) < lengths[:, None]).astype(float)
    tokens = grpo.Tokens(
        jnp.asarray(mask, jnp.float32),
        jnp.asarray(lengths[:, None] * np.ones((1, 5)), jnp.float32),
        jnp.asarray(3.0),
    )
    sums = (losses * mask).sum(1)
    expected = {
        "grpo": (sums / np.maximum(lengths, 1)).mean(),
        "bnpo": sums.sum() / 7,
        "dr_grpo": sums.sum() / (3 * 8),
        "dapo": sums.sum() / 7,
    }
    assert expected.keys() == grpo.REDUCTIONS.keys()
    for name, wanted in expected.items():
        share = grpo.REDUCTIONS[name](tokens, 8)
        found = np.sum(np.asarray(share.token) * losses) / float(share.total)
        assert found == pytest.approx(wanted, rel=1e-5), name
    # Two parts of one step: BNPO weighs parts, DAPO tokens.
    assert float(grpo.per_batch(tokens, 8).total) == 1
    assert float(grpo.per_token(tokens, 8).total) == 7


def plain_gae(rewards: Any, values: Any, gamma: float, lam: float) -> Any:
    after, found = 0.0, np.zeros(len(rewards))
    for t in reversed(range(len(rewards))):
        following = values[t + 1] if t + 1 < len(rewards) else 0.0
        after = rewards[t] + gamma * following - values[t] + gamma * lam * after
        found[t] = after
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.5), (1.0, 1.0)])
def test_gae_of_rows_that_hold_several_completions(gamma: float, lam: float) -> None:
    rewards, values = RNG.standard_normal((2, 2, 9))
    owner = np.array([[0, 1, 1, 1, 2, 2, 0, 3, 3], [1] * 9])
    mask = owner != 0
    goes_on = np.pad(owner[:, 1:] == owner[:, :-1], ((0, 0), (0, 1))) & mask
    small = [jnp.asarray(x, jnp.float32) for x in (rewards, values)]
    flags = [jnp.asarray(x) for x in (mask, goes_on)]
    found = ppo.gae(*small, *flags, gamma=gamma, lam=lam)
    expected = np.zeros((2, 9))
    for row in range(2):
        for one in set(owner[row]) - {0}:
            at = owner[row] == one
            expected[row, at] = plain_gae(rewards[row, at], values[row, at], gamma, lam)
    np.testing.assert_allclose(found.advantage_BT, expected, atol=1e-5)
    goal = np.where(mask, expected + values, 0)
    np.testing.assert_allclose(found.return_BT, goal, atol=1e-5)
    if gamma == lam == 1:
        # The return of the whole row, less its value.
        rest = rewards[1, ::-1].cumsum()[::-1]
        np.testing.assert_allclose(found.return_BT[1], rest, atol=1e-5)


def test_whitened_advantages() -> None:
    x = jnp.asarray([[3.0, 5.0, 100.0], [10.0, 2.0, -7.0]])
    mask = jnp.asarray([[True, True, False], [True, True, False]])
    found = np.asarray(ppo.whiten(x, mask))
    kept = np.array([3.0, 5, 10, 2])
    expected = (kept - 5) / np.sqrt(kept.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(found[np.asarray(mask)], expected, rtol=1e-5)
    assert np.all(found[~np.asarray(mask)] == 0)
    unmoved = np.asarray(ppo.whiten(x, mask, shift=False))
    np.testing.assert_allclose(unmoved[np.asarray(mask)], expected + 5, rtol=1e-5)
    assert np.all(np.isfinite(ppo.whiten(jnp.zeros((2, 2)), jnp.zeros((2, 2), bool))))


def test_the_value_loss_and_the_price_of_the_kl() -> None:
    value, old, goal = np.array([[1.0, 0.1, -3.0], [0.0] * 3, [2.0, 0.15, 1.0]])

    def reference(v: Any) -> Any:
        near = np.clip(v, old - 0.2, old + 0.2)
        return np.maximum((v - goal) ** 2, (near - goal) ** 2) / 2

    others = [jnp.asarray(x, jnp.float32) for x in (old, goal)]
    agree(lambda v: ppo.value_loss(v, *others), reference, [value])
    score, kl = jnp.asarray([0.0, 0.0, 2.0]), jnp.asarray([0.5, -1.0, 0.2])
    found = ppo.token_rewards(score, kl, kl_coef=0.05)
    np.testing.assert_allclose(found, [-0.025, 0.05, 1.99], rtol=1e-6)
