"""Log-probabilities token by token: the naive ones, at any chunk and any cotangent."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.losses.logprobs import chunked_nll
from ftjax.losses.token_logps import TokenLogps, token_logps
from tests.losses.programs import sizes

B, T, D, V = 3, 13, 8, 29


def naive(
    hidden: Any, head: Any, targets: Any, weights: Any, temperature: float
) -> TokenLogps:
    logits = jnp.einsum("btd,dv->btv", hidden, head) / temperature
    logp = jax.nn.log_softmax(logits)
    at = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
    best = jnp.argmax(logits, -1).astype(targets.dtype)
    entropy = -jnp.sum(jnp.exp(logp) * logp, -1)
    correct = (best == targets).astype(logits.dtype)
    found = (at, entropy, correct, jnp.mean(logits, -1), jnp.mean(logp, -1))
    return TokenLogps(*(jnp.where(weights != 0, x, 0) for x in found))


def inputs(dtype: Any = jnp.float64) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 3, (B, T)) * np.array([[1], [0], [1]])
    return (
        jnp.asarray(rng.standard_normal((B, T, D)), dtype),
        jnp.asarray(rng.standard_normal((D, V)), dtype),
        jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


def score(found: TokenLogps) -> Any:
    """Of a sequence no linear function of its tokens, as in DPO."""
    return jnp.sum(jnp.square(jnp.sum(found.logp_BT, axis=1)))


def smoothed_score(found: TokenLogps) -> Any:
    """The same, and something of all tokens of the vocabulary."""
    return score(found) + jnp.sum(jnp.square(jnp.sum(found.mean_logp_BT, axis=1)))


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_values_and_both_gradients_are_the_naive_ones(chunk: int) -> None:
    temperature, value = {
        1: (1.3, score),
        4: (0.7, smoothed_score),
        64: (1.0, smoothed_score),
    }[chunk]
    with jax.enable_x64(True):
        hidden, head, targets, w = inputs()

        def chunked(hidden: Any, head: Any) -> Any:
            found = token_logps(
                hidden, head, targets, w, chunk, temperature=temperature
            )
            return value(found), found

        def plain(hidden: Any, head: Any) -> Any:
            found = naive(hidden, head, targets, w, temperature)
            return value(found), found

        def both(f: Any) -> Any:
            return jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(hidden, head)

        (_, found), grads = both(chunked)
        (_, expected), wanted = both(plain)
    for name, a, b in zip(TokenLogps._fields, found, expected, strict=True):
        assert a.dtype == jnp.float32
        # The softmax is in float32, whatever the inputs are.
        np.testing.assert_allclose(a, b, atol=5e-6, err_msg=name)
    for a, b in zip(grads, map(np.asarray, wanted), strict=True):
        assert np.abs(b).max() > 1
        np.testing.assert_allclose(a, b, atol=5e-6 * np.abs(b).max())
    np.testing.assert_array_equal(grads[0][np.asarray(w) == 0], 0)


def test_a_tie_is_shared_so_that_a_dead_model_is_right_by_chance() -> None:
    hidden, head, targets, w = inputs(jnp.float32)
    ones = jnp.ones_like(w)
    dead = token_logps(0 * hidden, head, targets, ones, 4)
    np.testing.assert_allclose(dead.correct_BT, 1 / V, rtol=1e-6)
    nll = chunked_nll(0 * hidden, head, targets, ones, 4)
    np.testing.assert_allclose(nll.correct, B * T / V, rtol=1e-5)
    broken = token_logps(jnp.nan * hidden, head, targets, ones, 4)
    np.testing.assert_array_equal(broken.correct_BT, 0)


def test_one_gradient_does_not_depend_on_the_other() -> None:
    hidden, head, targets, w = inputs(jnp.float32)

    def total(hidden: Any, head: Any) -> Any:
        return score(token_logps(hidden, head, targets, w, 4))

    both = jax.grad(total, argnums=(0, 1))(hidden, head)
    np.testing.assert_array_equal(jax.grad(total, 0)(hidden, head), both[0])
    np.testing.assert_array_equal(jax.grad(total, 1)(hidden, head), both[1])


def test_runs_that_train_at_once_are_the_runs_by_themselves() -> None:
    hidden, head, targets, w = inputs(jnp.float32)
    several, temperatures = jnp.stack([hidden, 2 * hidden]), jnp.asarray([1.0, 0.5])

    def total(hidden: Any, temperature: Any) -> Any:
        return score(token_logps(hidden, head, targets, w, 4, temperature=temperature))

    found = jax.vmap(jax.grad(total))(several, temperatures)
    alone = jax.grad(total)(several[1], temperatures[1])
    np.testing.assert_allclose(found[1], alone, rtol=1e-5, atol=1e-5)


def test_only_log_probabilities_have_a_gradient() -> None:
    hidden, head, targets, w = inputs(jnp.float32)

    def others(hidden: Any, head: Any) -> Any:
        _, *rest, _ = token_logps(hidden, head, targets, w, 4)
        return sum(jnp.sum(x) for x in rest)

    for grad in jax.grad(others, argnums=(0, 1))(hidden, head):
        np.testing.assert_array_equal(grad, 0)


def test_bf16_hidden_states_keep_a_float32_softmax() -> None:
    hidden, head, targets, w = inputs(jnp.bfloat16)

    def total(hidden: Any, head: Any) -> Any:
        return jnp.sum(token_logps(hidden, head, targets, w, 4).logp_BT)

    value, grads = jax.value_and_grad(total, argnums=(0, 1))(hidden, head)
    wide = (hidden.astype(jnp.float32), head.astype(jnp.float32))

    def plain(hidden: Any, head: Any) -> Any:
        return jnp.sum(naive(hidden, head, targets, w, 1.0).logp_BT)

    expected, wanted = jax.value_and_grad(plain, argnums=(0, 1))(*wide)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, b in zip(grads, wanted, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), b, atol=0.05)


def test_large_logits_do_not_overflow() -> None:
    hidden, head, targets, w = inputs(jnp.float32)

    def total(hidden: Any) -> Any:
        found = token_logps(1000 * hidden, head, targets, w, 4)
        return score(found), found

    (_, found), grad = jax.value_and_grad(total, has_aux=True)(hidden)
    assert all(np.all(np.isfinite(x)) for x in found)
    assert np.all(np.isfinite(grad))
    assert np.all(np.asarray(found.entropy_BT) >= 0)


def test_all_logits_are_never_made_nor_kept() -> None:
    hidden, head, targets, w = inputs(jnp.float32)

    def largest(chunk: int) -> int:
        def total(hidden: Any, head: Any) -> Any:
            return score(token_logps(hidden, head, targets, w, chunk))

        program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(hidden, head)
        return max(sizes(program.jaxpr))[0]

    # The walk sees them where they are: one chunk as long as the rows.
    assert largest(10**6) == B * T * V
    assert largest(2) < B * T * V // 2


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, targets, w = inputs(jnp.float32)

    def total(hidden: Any, head: Any) -> Any:
        return score(token_logps(hidden, head, targets, w, 2))

    found = {}
    for argnums in ((0,), (0, 1)):
        program = jax.make_jaxpr(jax.grad(total, argnums=argnums))(hidden, head)
        found[argnums] = sum(
            size == D * V and name == "dot_general"
            for size, name in sizes(program.jaxpr)
        )
    assert found == {(0,): 0, (0, 1): 1}


def test_positions_without_weight_never_reach_the_head() -> None:
    hidden, head, targets, w = inputs(jnp.float32)

    def total(hidden: Any, head: Any) -> Any:
        return score(token_logps(hidden, head, targets, few, 1))

    few = jnp.zeros_like(w).at[:, 5].set(1.0)
    poisoned = jnp.where((few == 0)[..., None], jnp.nan, hidden)
    clean = jax.value_and_grad(total, argnums=(0, 1))(hidden, head)
    found = jax.value_and_grad(total, argnums=(0, 1))(poisoned, head)
    jax.tree.map(np.testing.assert_array_equal, found, clean)
