"""The loss of a reward model, its metrics, and whether it is as sure as it is right."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.losses import reward
from tests.losses.numeric import agree, all_finite, log_sigmoid, sigmoid


def test_value_and_gradient_are_the_formula() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected, margin = rng.standard_normal((3, 2, 4))

    def reference(c: Any, r: Any, m: Any) -> Any:
        return -log_sigmoid(c - r - m) + 0.01 * (c + r) ** 2

    def loss(c: Any, r: Any, m: Any) -> Any:
        return reward.reward(c, r, margin=m, center=0.01)

    agree(loss, reference, [chosen, rejected, margin])


def test_known_values() -> None:
    one = jnp.asarray(1.2)
    found = reward.reward(one, jnp.asarray(0.3))
    assert float(found) == pytest.approx(0.3411538747)
    assert float(reward.reward(one, one)) == pytest.approx(np.log(2))


def test_far_ends_are_finite() -> None:
    far = np.array([0.0, 1e4, -1e4])
    all_finite(lambda c, r: reward.reward(c, r, center=0.01), far, -far)


def test_metrics_and_extremes_leave_empty_slots_out() -> None:
    chosen, rejected = (
        jnp.asarray([1.0, 2.0, 5.0, 0.0]),
        jnp.asarray([0.5, 2.0, 6.0, 0]),
    )
    found = reward.metrics(chosen, rejected)
    np.testing.assert_array_equal(found["accuracy"], [1, 0, 0, 0])
    np.testing.assert_array_equal(found["accuracy_fair"], [1, 0.5, 0, 0.5])
    np.testing.assert_array_equal(found["margin"], [0.5, 0, -1, 0])
    np.testing.assert_array_equal(found["mean_reward"], [0.75, 2, 5.5, 0])
    real = jnp.asarray([True, True, True, False])
    low, high = reward.extremes(chosen, rejected, real)
    assert (float(low), float(high)) == (0.5, 6.0)


def test_calibration_of_a_model_that_is_as_good_as_it_says() -> None:
    rng = np.random.default_rng(0)
    size = np.abs(2 * rng.standard_normal(20_000))
    # The completion that is ranked first is the chosen one as often as s(|m|) says.
    right = rng.random(size.shape) < sigmoid(size)
    margin = jnp.asarray(np.where(right, size, -size), jnp.float32)
    weight = jnp.ones_like(margin)
    assert float(reward.calibration_error(reward.calibration(margin, weight))) < 0.02
    # Ten times as sure, and no better.
    sure = reward.calibration(10 * margin, weight)
    assert float(reward.calibration_error(sure)) > 0.1


def test_calibration_sums_by_hand() -> None:
    margin = jnp.asarray([[3.0, -3.0], [0.0, 9.0]])
    weight = jnp.asarray([[1.0, 1.0], [2.0, 0.0]])
    bins = reward.calibration(margin, weight, bins=2)
    np.testing.assert_allclose(bins.weight, [2, 2])
    np.testing.assert_allclose(bins.confidence, [1, 2 * sigmoid(3)], rtol=1e-6)
    np.testing.assert_allclose(bins.correct, [1, 1])
    both = jax.tree.map(jnp.add, bins, bins)
    expected = (2 * sigmoid(3) - 1) / 4
    assert float(reward.calibration_error(both)) == pytest.approx(expected, rel=1e-6)
    empty = reward.calibration(margin, jnp.zeros_like(weight))
    assert float(reward.calibration_error(empty)) == 0
