"""DPO and its relatives: their formulas in float64, known values, and far ends."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.losses import dpo, dpo_variants
from ftjax.losses.dpo import LOSSES, OF_RATIOS, OF_SCORES, Options
from ftjax.losses.f_divergence import SCORES
from ftjax.losses.pairs import Pairs
from tests.losses.numeric import agree, all_finite, log_sigmoid, sigmoid

BETA, EPS, TAU, ALPHA = 0.3, 0.1, 0.05, 0.5
LENGTHS = (np.array([7.0, 3, 12, 1, 5]), np.array([4.0, 9, 12, 2, 6]))


def logps(scale: float = 2.0) -> list[Any]:
    """Chosen, rejected, and both under the reference, [5] float64."""
    rng = np.random.default_rng(3)
    return list(-20 + scale * rng.standard_normal((4, 5)))


def smoothed(u: Any) -> Any:
    return -(1 - EPS) * log_sigmoid(u) - EPS * log_sigmoid(-u)


def aot(p: Any, q: Any) -> Any:
    """Each pair at its own rank, as `dpo_variants.aot` gives them."""
    rank = np.argsort(np.argsort(p))
    return smoothed(BETA * (p - np.sort(q)[rank]))


SCORE = {
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: 1 - np.exp(-x),
    "js_divergence": lambda x: np.log(2) + log_sigmoid(x),
    "alpha_divergence": lambda x: (np.exp((ALPHA - 1) * x) - 1) / (ALPHA - 1),
}


def reference(name: str, divergence: str) -> Any:
    """The formula of a loss, in float64, from the four log-probabilities."""
    f, (n_c, n_r) = SCORE[divergence], LENGTHS

    def of_scores(p_c: Any, p_r: Any, q_c: Any, q_r: Any) -> Any:
        s_c, s_r = f(p_c - q_c), f(p_r - q_r)
        u, mean = BETA * (s_c - s_r), s_c / n_c - s_r / n_r
        g = sigmoid(u / TAU)
        return {
            "sigmoid": lambda: smoothed(u),
            "hinge": lambda: np.maximum(0, 1 - u),
            "ipo": lambda: (mean - 1 / (2 * BETA)) ** 2,
            "ipo_sum": lambda: (u / BETA - 1 / (2 * BETA)) ** 2,
            "exo_pair": lambda: (
                sigmoid(u) * (log_sigmoid(u) - np.log(1 - EPS))
                + sigmoid(-u) * (log_sigmoid(-u) - np.log(EPS))
            ),
            "robust": lambda: (
                (-(1 - EPS) * log_sigmoid(u) + EPS * log_sigmoid(-u)) / (1 - 2 * EPS)
            ),
            "discopop": lambda: (1 - g) * -log_sigmoid(u) + g * np.exp(-u),
            "sigmoid_norm": lambda: -log_sigmoid(BETA * mean),
            "sft": lambda: -p_c * len(p_c) / n_c.sum(),
        }[name]()

    def of_ratios(p_c: Any, p_r: Any, q_c: Any, q_r: Any) -> Any:
        c, r = p_c - q_c, p_r - q_r
        bc, br = BETA * c, BETA * r
        return {
            "nca_pair": lambda: (
                -log_sigmoid(bc) - 0.5 * (log_sigmoid(-bc) + log_sigmoid(-br))
            ),
            "bco_pair": lambda: -log_sigmoid(bc) - log_sigmoid(-br),
            "sppo_hard": lambda: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
            "aot": lambda: aot(p_c - p_r, q_c - q_r),
            "aot_unpaired": lambda: aot(c, r),
            "apo_zero": lambda: 1 - sigmoid(bc) + sigmoid(br),
            "apo_down": lambda: sigmoid(bc) + 1 - sigmoid(bc - br),
        }[name]()

    return of_scores if name in OF_SCORES else of_ratios


def options(divergence: str = "reverse_kl") -> Options:
    return Options(BETA, EPS, divergence, ALPHA, TAU)


def pairs_of(arrays: Any, lengths: Any = LENGTHS) -> Pairs:
    return Pairs(*arrays, *(jnp.asarray(n, jnp.float32) for n in lengths))


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_the_formulas(name: str) -> None:
    def loss(*arrays: Any) -> Any:
        return LOSSES[name](pairs_of(arrays), options())

    agree(loss, reference(name, "reverse_kl"), logps())


@pytest.mark.parametrize(
    "divergence", [name for name in SCORES if name != "reverse_kl"]
)
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sigmoid_norm"])
def test_other_divergences(name: str, divergence: str) -> None:
    def loss(*arrays: Any) -> Any:
        return LOSSES[name](pairs_of(arrays), options(divergence))

    agree(loss, reference(name, divergence), logps(0.7))


def test_alpha_of_one_is_the_reverse_kl() -> None:
    x = jnp.asarray([-3.0, 0.0, 2.0])
    score = SCORES["alpha_divergence"]
    np.testing.assert_array_equal(score(x, 1.0), x)
    slope = jax.grad(lambda x: jnp.sum(score(x, 1.0)))(x)
    np.testing.assert_array_equal(slope, 1.0)


# beta 0.1, eps 0, but 1e-3 in EXO, which has none without.
AT_START = {
    "sigmoid": math.log(2),
    "hinge": 1,
    "ipo": 25,
    "ipo_sum": 25,
    "exo_pair": -math.log(2) - (math.log(1 - 1e-3) + math.log(1e-3)) / 2,
    "nca_pair": 2 * math.log(2),
    "robust": math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 50,
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero": 1,
    "apo_down": 1,
    "discopop": (math.log(2) + 1) / 2,
    "sigmoid_norm": math.log(2),
    "sft": 20 * 5 / LENGTHS[0].sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_where_policy_and_reference_are_the_same(name: str) -> None:
    same = [jnp.full((5,), -20.0, jnp.float32)] * 4
    eps = 1e-3 if name == "exo_pair" else 0.0
    found = LOSSES[name](pairs_of(same), Options(0.1, eps))
    np.testing.assert_allclose(found, AT_START[name], rtol=2e-5)


# Made elsewhere in float64: log-probabilities -12, -14, under the reference -13, -12.5.
@pytest.mark.parametrize(
    ("name", "eps", "expected"),
    [
        ("sigmoid", 0.0, (0.5759394198788436, 0.2519290813453729)),
        ("sigmoid", 0.1, (0.6009394199, 0.3769290813)),
        ("robust", 0.1, (0.5446894199, 0.0956790815)),
        ("ipo_sum", 0.0, (6.25, 2.25)),
        ("hinge", 0.0, (0.75, 0.0)),
    ],
)
def test_known_values(name: str, eps: float, expected: tuple[float, float]) -> None:
    given = [jnp.asarray([x], jnp.float32) for x in (-12.0, -14.0, -13.0, -12.5)]
    pairs = pairs_of(given, ([10], [8]))
    found = [LOSSES[name](pairs, Options(beta, eps))[0] for beta in (0.1, 0.5)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_dpo_in_closed_form() -> None:
    delta = jnp.asarray([-30.0, -2.0, 0.0, 2.5, 40.0])
    slope = jax.grad(lambda d: jnp.sum(dpo.sigmoid(d, beta=0.5)))(delta)
    wide = np.asarray(delta, np.float64)
    np.testing.assert_allclose(slope, -0.5 * sigmoid(-0.5 * wide), rtol=1e-5)


def test_a_swapped_pair_costs_its_own_margin_more() -> None:
    delta = jnp.asarray([-3.0, 0.5, 7.0])
    back = dpo.sigmoid(-delta, beta=0.2) - dpo.sigmoid(delta, beta=0.2)
    np.testing.assert_allclose(back, 0.2 * delta, rtol=1e-5)


def test_the_minimum_of_ipo_is_at_its_margin() -> None:
    at = jnp.asarray([1 / (2 * 0.25)])
    assert float(dpo_variants.ipo_sum(at, beta=0.25)[0]) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_far_ends_and_empty_slots_are_finite(name: str) -> None:
    far = np.array([1e4, -1e4, 0.0, 0.0])
    for divergence in SCORES if name in OF_SCORES else ("reverse_kl",):

        def loss(*arrays: Any, divergence: str = divergence) -> Any:
            # The last slot holds no pair.
            pairs = pairs_of(arrays, ([3, 3, 3, 0], [4, 4, 4, 0]))
            return LOSSES[name](pairs, options(divergence))

        all_finite(loss, far, -far / 2, 0 * far, 0 * far)


@pytest.mark.parametrize("name", LOSSES)
def test_empty_slots_and_the_shape_do_not_matter(name: str) -> None:
    full = pairs_of([jnp.asarray(x, jnp.float32) for x in logps()])
    places = np.array([0, 2, 3, 5, 7])

    def spread(x: Any) -> Any:
        return jnp.zeros((8,), x.dtype).at[places].set(x).reshape(2, 4)

    found = LOSSES[name](Pairs(*map(spread, full)), options())
    assert found.shape == (2, 4)
    expected = LOSSES[name](full, options())
    np.testing.assert_allclose(found.ravel()[places], expected, rtol=1e-6)


def test_only_losses_of_all_pairs_see_the_others() -> None:
    full = pairs_of([jnp.asarray(x, jnp.float32) for x in logps()])
    first = jax.tree.map(lambda x: x[:2], full)
    changed = {
        name
        for name, loss in LOSSES.items()
        if not np.allclose(loss(first, options()), loss(full, options())[:2])
    }
    assert changed == dpo.WHOLE_BATCH


def test_every_number_may_be_traced() -> None:
    full = pairs_of([jnp.asarray(x, jnp.float32) for x in logps()])
    betas = jnp.asarray([0.1, 0.5])
    for name, loss in LOSSES.items():

        def at(beta: Any, loss: Any = loss) -> Any:
            return loss(full, Options(beta, EPS * beta / beta, tau=TAU * beta / beta))

        expected = jnp.stack([loss(full, Options(b, EPS)) for b in (0.1, 0.5)])
        found = np.asarray(jax.vmap(at)(betas))
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)


def test_the_metrics_of_pairs() -> None:
    given = [[-5.0, -6.0, -7.0], [-8.0, -6.0, -7.0], [-6.0, -6.0, -7.0], [-7.0] * 3]
    arrays = [jnp.asarray(x, jnp.float32) for x in given]
    found = dpo.metrics(pairs_of(arrays, ([2, 2, 2], [2, 2, 2])), beta=0.5)
    expected: dict[str, list[float]] = {
        "rewards/chosen": [0.5, 0, 0],
        "rewards/rejected": [-0.5, 0.5, 0],
        "rewards/margins": [1, -0.5, 0],
        "rewards/accuracies": [1, 0, 0],
        "rewards/accuracies_fair": [1, 0, 0.5],
        "logps/chosen": given[0],
        "logps/rejected": given[1],
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, err_msg=name)


def test_ld_dpo_weighs_down_what_is_longer_than_the_other() -> None:
    position = jnp.asarray([[0, 1, 2, 3, 4, 0]])
    shared = jnp.full_like(position, 2)
    found = dpo.length_desensitized(position, shared, 0.25)
    np.testing.assert_array_equal(found, [[0, 1, 1, 0.25, 0.25, 0]])


def test_names_are_sorted_by_what_they_read() -> None:
    assert not OF_SCORES.keys() & OF_RATIOS.keys()
    assert len(LOSSES) == 16
