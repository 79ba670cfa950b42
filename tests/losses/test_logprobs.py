"""The chunked head: the naive log-likelihood and its gradients, at any chunk."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Jaxpr

from ftjax.losses.logprobs import chunked_nll
from ftjax.models.decoder import Decoder
from ftjax.models.proj import abstract_params
from ftjax.objectives.causal import causal
from ftjax.optim import make_optimizer
from ftjax.step import init_state, make_train_step
from tests.losses.programs import sizes
from tests.models_small import (
    SPEC,
    micro,
    optim_config,
    small_batch,
    small_lora,
    split,
)

B, T, D, V = 3, 13, 8, 29


def naive(hidden: Any, head: Any, targets: Any, weights: Any) -> Any:
    logits = jnp.einsum("btd,dv->btv", hidden, head)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
    return -jnp.sum(weights * logp[..., 0])


def inputs(weights: str, dtype: Any = jnp.float64) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    w = {
        "ones": np.ones((B, T)),
        "some": rng.integers(0, 2, (B, T)).astype(float),
        "real": rng.uniform(0, 3, (B, T)) * rng.integers(0, 2, (B, T)),
        "row of zeros": np.ones((B, T)) * np.array([[1], [0], [1]]),
        "zeros": np.zeros((B, T)),
    }[weights]
    return (
        jnp.asarray(rng.standard_normal((B, T, D)), dtype),
        jnp.asarray(rng.standard_normal((D, V)), dtype),
        jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        jnp.asarray(w, jnp.float32),
    )


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
@pytest.mark.parametrize("weights", ["ones", "some", "real", "row of zeros", "zeros"])
def test_value_and_both_gradients_are_the_naive_ones(weights: str, chunk: int) -> None:
    with jax.enable_x64(True):
        hidden, head, targets, w = inputs(weights)

        def chunked(hidden: Any, head: Any) -> Any:
            found = chunked_nll(hidden, head, targets, w, chunk)
            return found.sum, (found.correct, found.logp_BT)

        grad = jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True)
        (value, (correct, logp)), grads = grad(hidden, head)
        plain = jax.value_and_grad(naive, argnums=(0, 1))
        expected, wanted = plain(hidden, head, targets, w.astype(jnp.float64))
        logits = np.asarray(jnp.einsum("btd,dv->btv", hidden, head))
    # The softmax is in float32, whatever the inputs are.
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    for a, b in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)
    hits = logits.argmax(-1) == np.asarray(targets)
    assert float(correct) == pytest.approx(float((hits * np.asarray(w)).sum()))
    lse = np.log(np.exp(logits).sum(-1))
    at = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(logp, np.where(w != 0, at - lse, 0), atol=5e-6)


def test_one_gradient_does_not_depend_on_the_other() -> None:
    hidden, head, targets, w = inputs("some", jnp.float32)

    def total(hidden: Any, head: Any) -> Any:
        return chunked_nll(hidden, head, targets, w, 4).sum

    both = jax.grad(total, argnums=(0, 1))(hidden, head)
    np.testing.assert_array_equal(jax.grad(total, 0)(hidden, head), both[0])
    np.testing.assert_array_equal(jax.grad(total, 1)(hidden, head), both[1])
    doubled = jax.grad(lambda h: 2 * total(h, head))(hidden)
    np.testing.assert_array_equal(doubled, 2 * both[0])


def test_bf16_hidden_states_keep_a_float32_softmax() -> None:
    hidden, head, targets, w = inputs("some", jnp.bfloat16)

    def total(hidden: Any, head: Any) -> Any:
        return chunked_nll(hidden, head, targets, w, 4).sum

    value, grads = jax.value_and_grad(total, argnums=(0, 1))(hidden, head)
    wide = (hidden.astype(jnp.float32), head.astype(jnp.float32))
    plain = jax.value_and_grad(naive, argnums=(0, 1))
    expected, wanted = plain(*wide, targets, w)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, b in zip(grads, wanted, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), b, atol=0.05)


def test_large_logits_do_not_overflow() -> None:
    hidden, head, targets, w = inputs("ones", jnp.float32)
    found = chunked_nll(100 * hidden, head, targets, w, 4)
    assert np.isfinite(found.sum) and np.all(np.isfinite(found.logp_BT))


def step_jaxpr(method: str, chunk: int) -> tuple[Jaxpr, int, int]:
    spec = replace(SPEC, vocab_size=1009, tied=False)
    model = Decoder(spec)
    lora = small_lora(model)[1]
    trained, frozen = jax.eval_shape(
        lambda params: split(method, {"params": params}, lora), abstract_params(model)
    )
    tx = make_optimizer(optim_config(), 10)
    state = jax.eval_shape(lambda trained: init_state(trained, tx, 0), trained)
    batch = micro(small_batch(), 1)
    step = make_train_step(causal(model, chunk), tx)
    jaxpr = jax.make_jaxpr(step)(state, frozen, batch)
    tokens = batch["tokens"].size
    return jaxpr.jaxpr, tokens * spec.vocab_size, spec.d_model * spec.vocab_size


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_step_never_makes_all_logits(method: str) -> None:
    jaxpr, all_logits, _ = step_jaxpr(method, chunk=2)
    made = list(sizes(jaxpr))
    assert len(made) > 100 and max(made)[0] < all_logits, max(made)
    # The walk sees them where they are: one chunk as long as the rows.
    jaxpr, all_logits, _ = step_jaxpr(method, chunk=10**6)
    assert max(sizes(jaxpr))[0] >= all_logits


def test_a_frozen_head_gets_no_gradient() -> None:
    found = {}
    for method in ("lora", "full"):
        jaxpr, _, head = step_jaxpr(method, chunk=2)
        found[method] = sum(
            size == head and name == "dot_general" for size, name in sizes(jaxpr)
        )
    assert found == {"lora": 0, "full": 1}
