"""Schedules and masks of the optimizer."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.optim import decayed, make_optimizer, make_schedule
from tests.models_small import optim_config, small_lora, small_model


def test_warm_up_then_the_schedule_down_to_its_end() -> None:
    rate = make_schedule(optim_config(lr=1.0, warmup=4, schedule="linear"), 14)
    values = [float(rate(step)) for step in range(14)]
    np.testing.assert_allclose(values[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert all(a > b for a, b in itertools.pairwise(values[4:]))
    assert float(rate(14)) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_every_schedule_starts_at_the_rate(name: str) -> None:
    rate = make_schedule(optim_config(lr=0.5, schedule=name), 10)
    assert float(rate(0)) == pytest.approx(0.5)
    assert float(rate(10)) == pytest.approx(0.5 if name == "constant" else 0.05)


@pytest.mark.parametrize(
    ("steps", "usual"), [(1, 0), (3, 1), (19, 9), (20, 10), (5000, 10)]
)
def test_the_usual_warm_up_is_short_where_the_run_is(steps: int, usual: int) -> None:
    rates = [make_schedule(optim_config(warmup=n), steps) for n in (-1, usual)]
    for step in range(min(steps, 30)):
        assert float(rates[0](step)) == float(rates[1](step))


def test_wsd_stays_and_then_falls_over_its_share() -> None:
    config = optim_config(lr=1.0, warmup=2, schedule="wsd", decay=0.4, final=0.2)
    rate = make_schedule(config, 10)
    values = [float(rate(step)) for step in range(11)]
    expected = [1 / 3, 2 / 3, *[1.0] * 5, 0.8, 0.6, 0.4, 0.2]
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_wsd_falls_no_earlier_than_the_warm_up_ends() -> None:
    config = optim_config(lr=1.0, warmup=5, schedule="wsd", decay=1.0, final=0.0)
    rate = make_schedule(config, 10)
    np.testing.assert_allclose([float(rate(s)) for s in (5, 10)], [1.0, 0.0], atol=1e-6)


def test_decay_is_for_matrices_alone() -> None:
    model, params = small_model()
    mask = decayed({"params": params, "lora": small_lora(model)[1]})
    layer = mask["params"]["layers"]
    assert layer["mlp"]["up_proj"]["w"] and mask["params"]["embed_tokens"]["embedding"]
    assert not layer["input_layernorm"]["scale"] and not mask["params"]["norm"]["scale"]
    delta = mask["lora"]["layers"]["mlp"]["up_proj"]["w"]
    assert delta.a and delta.b and not delta.scale
    assert not decayed({"params": {"q_proj": {"b": 0, "w": 0}}})["params"]["q_proj"][
        "b"
    ]


def test_moments_are_float32_and_decay_does_not_pass_through_adam() -> None:
    tx = make_optimizer(optim_config(lr=0.1, weight_decay=0.5, clip_norm=0.0), 10)
    params = {"params": {"x": {"w": jnp.full((2, 2), 3.0)}}}
    state = tx.init(params)
    assert all(
        leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state) if leaf.ndim == 2
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    update, _ = tx.update(zero, state, params)
    np.testing.assert_allclose(update["params"]["x"]["w"], -0.1 * 0.5 * 3.0, rtol=1e-6)
