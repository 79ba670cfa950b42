"""KTO, CPO, SimPO and losses of single tokens: formulas, known values, far ends."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.losses import cpo, kto, simpo, token_losses
from ftjax.losses.pairs import Pairs
from tests.losses.numeric import agree, all_finite, log_sigmoid, sigmoid

BETA, EPS, GAMMA = 0.3, 0.1, 0.8
LABEL = np.array([True, False, True, False, False])
N_C, N_R = np.array([7.0, 3, 12]), np.array([4.0, 9, 12])


def test_kto_is_its_formula() -> None:
    ratio = np.array([-3.0, 2.0, 0.4, 9.0, -1.0])

    def reference(x: Any) -> Any:
        up = 1.5 * (1 - sigmoid(BETA * (x - 0.7)))
        down = 0.9 * (1 - sigmoid(BETA * (0.7 - x)))
        return np.where(LABEL, up, down)

    def loss(x: Any) -> Any:
        z0, weights = jnp.asarray(0.7), {"desirable": 1.5, "undesirable": 0.9}
        return kto.kto(x, jnp.asarray(LABEL), z0, beta=BETA, **weights)

    agree(loss, reference, [ratio])

    def unpaired(x: Any) -> Any:
        return np.where(LABEL, 1 - sigmoid(BETA * x), sigmoid(BETA * x))

    def zero(x: Any) -> Any:
        return kto.apo_zero_unpaired(x, jnp.asarray(LABEL), beta=BETA)

    agree(zero, unpaired, [ratio])


# Made elsewhere in float64: log p / p_ref is 1 and -1.5, z0 is 0.2.
@pytest.mark.parametrize(
    ("beta", "expected"),
    [(0.1, (0.4800106598, 0.4576020592)), (0.5, (0.4013123399, 0.2994328575))],
)
def test_known_values_of_kto(beta: float, expected: tuple[float, float]) -> None:
    ratio, label = jnp.asarray([1.0, -1.5]), jnp.asarray([True, False])
    found = kto.kto(ratio, label, jnp.asarray(0.2), beta=beta)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    start = kto.kto(jnp.zeros(2), label, jnp.asarray(0.0), beta=beta)
    np.testing.assert_array_equal(start, 0.5)


def test_the_reference_point_is_a_mean_that_is_not_negative() -> None:
    ratio = jnp.asarray([3.0, -1.0, 100.0])
    real = jnp.asarray([True, True, False])
    assert float(kto.reference_point(ratio, real)) == 1
    assert float(kto.reference_point(-ratio, real)) == 0
    assert float(kto.reference_point(ratio, jnp.zeros(3, bool))) == 0


def test_metrics_of_kto_are_over_what_they_name() -> None:
    ratio, logp = jnp.asarray([1.0, 2.0, 4.0, 0.0]), jnp.asarray([-1.0, -2, -3, 0])
    label, real = (
        jnp.asarray([True, False, True, True]),
        jnp.asarray([True] * 3 + [False]),
    )
    found = kto.metrics(ratio, logp, label, real, beta=0.5)
    means = {
        k: float(jnp.sum(v.value * v.weight) / jnp.sum(v.weight))
        for k, v in found.items()
    }
    assert means == {
        "rewards/chosen": 1.25,
        "rewards/rejected": 1,
        "logps/chosen": -2,
        "logps/rejected": -2,
    }


def test_the_recommended_weights_of_kto() -> None:
    to_desirable, to_undesirable = kto.recommended(100, 300, 1.0, 1.0)
    assert to_desirable == pytest.approx((3, 4))
    assert to_undesirable == pytest.approx((0.25, 1 / 3))


def smoothed(u: Any) -> Any:
    return -(1 - EPS) * log_sigmoid(u) - EPS * log_sigmoid(-u)


def alpha_reward(p: Any, alpha: float) -> Any:
    return (1 - np.exp(p) ** -alpha) / alpha if alpha else p


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.1])
@pytest.mark.parametrize("name", cpo.LOSSES)
def test_cpo_and_simpo_are_their_formulas(name: str, alpha: float) -> None:
    def reference(c: Any, r: Any) -> Any:
        if name in ("ipo", "simpo"):
            c, r = c / N_C, r / N_R
        delta = alpha_reward(c, alpha) - alpha_reward(r, alpha)
        return {
            "sigmoid": lambda: smoothed(BETA * delta),
            "hinge": lambda: np.maximum(0, 1 - BETA * delta),
            "ipo": lambda: (delta - 1 / (2 * BETA)) ** 2,
            "simpo": lambda: smoothed(BETA * delta - GAMMA),
        }[name]()

    args = [np.array([-3.0, -5, -2]), np.array([-4.0, -4.5, -7])]
    options = cpo.Options(BETA, EPS, GAMMA, alpha)
    agree(lambda c, r: cpo.LOSSES[name](pairs_of(c, r), options), reference, args)
    far = np.array([1e4, 0, -1e4])
    for c in (far, -far):
        all_finite(lambda c, r: cpo.LOSSES[name](pairs_of(c, r), options), c, 0 * c)


def pairs_of(chosen: Any, rejected: Any) -> Pairs:
    lengths = (jnp.asarray(n, jnp.float32) for n in (N_C, N_R))
    return Pairs(chosen, rejected, 0 * chosen, 0 * chosen, *lengths)


def test_known_values_of_simpo() -> None:
    at = jnp.asarray(-1.2), jnp.asarray(-1.75)
    found = simpo.simpo(*at, beta=2.0, gamma=0.5)
    assert float(found) == pytest.approx(0.4374879505)
    level = simpo.simpo(*at, beta=2.0, gamma=1.1)
    assert float(level) == pytest.approx(math.log(2), rel=1e-5)


def test_metrics_of_cpo_are_of_what_the_loss_reads() -> None:
    pairs = pairs_of(jnp.asarray([-7.0, -3, -12]), jnp.asarray([-8.0, -9, -6]))
    found = cpo.metrics(pairs, cpo.Options(2.0), "simpo")
    np.testing.assert_allclose(found["logps/chosen"], [-1, -1, -1])
    np.testing.assert_allclose(found["rewards/rejected"], [-4, -2, -1])
    np.testing.assert_array_equal(found["rewards/accuracies"], [1, 0, 0])
    sums = cpo.metrics(pairs, cpo.Options(0.5), "sigmoid")
    np.testing.assert_allclose(sums["rewards/margins"], [0.5, 3, -3])


def test_losses_of_tokens() -> None:
    logp = np.array([-1e4, -3.0, -0.1, 0.0])
    probability = np.exp(logp)
    agree(
        lambda p: token_losses.dft(p),
        lambda p: -probability * p,
        [logp],
    )

    def smoothed(logp: Any, mean: Any) -> Any:
        return token_losses.label_smoothed(logp, mean, label_smoothing=EPS)

    mean = np.array([-2e4, -5.0, -9.0, -30.0])
    agree(smoothed, lambda p, m: -(1 - EPS) * p - EPS * m, [logp, mean])
