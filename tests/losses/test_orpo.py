"""The odds ratio of ORPO: its formula, closed gradients, and sure completions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.losses import orpo
from tests.losses.numeric import agree, all_finite, log_sigmoid


def reference(chosen: Any, rejected: Any, beta: float = 0.3) -> Any:
    def log_odds(p: Any) -> Any:
        return p - np.log1p(-np.exp(p))

    return -beta * log_sigmoid(log_odds(chosen) - log_odds(rejected))


def test_value_and_gradient_are_the_formula() -> None:
    chosen = np.array([-0.01, -0.5, -1.2, -5.0, -40.0])
    rejected = np.array([-0.3, -0.02, -1.75, -9.0, -0.7])
    agree(lambda c, r: orpo.odds_ratio(c, r, beta=0.3), reference, [chosen, rejected])


# Made elsewhere in float64, for mean log-probabilities -1.2 and -1.75.
def test_known_values_and_the_closed_gradient() -> None:
    at = (jnp.asarray(-1.2), jnp.asarray(-1.75))
    odds = orpo.log_odds_ratio(*at)
    assert float(odds) == pytest.approx(0.7174955512, rel=1e-6)
    assert float(orpo.odds_ratio(*at, beta=1.0)) == pytest.approx(0.3974146768)
    slopes = jax.grad(lambda c, r: orpo.odds_ratio(c, r, beta=1.0), (0, 1))(*at)
    assert float(slopes[0]) == pytest.approx(-0.4692930761, rel=1e-6)
    assert float(slopes[1]) == pytest.approx(0.3969188762, rel=1e-6)


def test_log1mexp_is_exact_on_both_sides_of_its_branch() -> None:
    x = np.array([-1e-7, -1e-3, -0.69, -0.6931472, -0.7, -5.0, -60.0, -1e4])
    small = jnp.asarray(x, jnp.float32)
    wide = np.asarray(small, np.float64)
    expected = np.where(
        wide > -1, np.log(-np.expm1(wide)), np.log1p(-np.exp(np.minimum(wide, -1)))
    )
    np.testing.assert_allclose(orpo.log1mexp(small), expected, rtol=3e-6, atol=1e-30)
    slope = jax.vmap(jax.grad(orpo.log1mexp))(small)
    np.testing.assert_allclose(slope, np.exp(wide) / np.expm1(wide), rtol=2e-5)


def test_sure_and_impossible_completions_are_finite() -> None:
    p, q = np.meshgrid([0.0, -1e-30, -1e-7, -1e4], [0.0, -1e-7, -3.0, -1e4])
    all_finite(lambda c, r: orpo.odds_ratio(c, r, beta=0.1), p, q)
    found = orpo.metrics(*(jnp.asarray(x, jnp.float32) for x in (p, q)), beta=0.1)
    assert all(np.all(np.isfinite(x)) for x in found.values())


def test_the_metrics_have_the_names_of_trl() -> None:
    chosen, rejected = jnp.asarray([-1.2, -2.0]), jnp.asarray([-1.75, -1.0])
    found = orpo.metrics(chosen, rejected, beta=0.1)
    odds = orpo.log_odds_ratio(chosen, rejected)
    np.testing.assert_allclose(found["rewards/chosen"], [-0.12, -0.2], rtol=1e-6)
    np.testing.assert_array_equal(found["rewards/accuracies"], [1, 0])
    np.testing.assert_array_equal(found["logps/rejected"], rejected)
    np.testing.assert_array_equal(found["log_odds_chosen"], odds)
    np.testing.assert_allclose(
        found["log_odds_ratio"], log_sigmoid(np.asarray(odds)), rtol=1e-5
    )
