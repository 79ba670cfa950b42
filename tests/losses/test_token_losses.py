"""Label smoothing, DFT and NEFTune against the naive losses, and in evaluation."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.errors import UserError
from ftjax.losses.causal_lm import OTHER, causal_lm, dynamic_lm
from ftjax.losses.neftune import noise
from ftjax.models.decoder import Decoder
from ftjax.objectives.causal import causal
from ftjax.sharding import batch_sharding, make_mesh
from tests.losses.programs import sizes
from tests.losses.test_logprobs import B, T, V, inputs
from tests.models_small import SPEC, small_batch, small_model

EPS, ALPHA = 0.1, 50.0


def smoothed(logp: Any, at: Any) -> Any:
    return -(1 - EPS) * at - EPS * jnp.mean(logp, -1)


def dynamic(logp: Any, at: Any) -> Any:
    del logp
    return -jax.lax.stop_gradient(jnp.exp(at)) * at


LOSSES: dict[str, Any] = {
    "label smoothing": (partial(causal_lm, label_smoothing=EPS), smoothed),
    "dft": (dynamic_lm, dynamic),
}


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_both_gradients_are_the_naive_ones(name: str, chunk: int) -> None:
    ours, formula = LOSSES[name]
    with jax.enable_x64(True):
        hidden, head, targets, w = inputs("real")
        batch = {"targets": targets, "weights": w}

        def chunked(hidden: Any, head: Any) -> Any:
            found = ours(hidden, head, batch, chunk)
            return found.terms[OTHER], found.means["nll"]

        def naive(hidden: Any, head: Any) -> Any:
            logp = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", hidden, head))
            at = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
            weights = w.astype(at.dtype)
            return jnp.sum(weights * formula(logp, at)), -jnp.sum(weights * at)

        def both(f: Any) -> Any:
            return jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(hidden, head)

        ((value, nll), grads), ((expected, plain), wanted) = both(chunked), both(naive)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    np.testing.assert_allclose(nll.sum, plain, rtol=2e-6)
    np.testing.assert_allclose(nll.weight, np.sum(w), rtol=1e-6)
    for a, b in zip(grads, wanted, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_all_logits_are_never_made(name: str) -> None:
    hidden, head, targets, w = inputs("real", jnp.float32)
    batch = {"targets": targets, "weights": w}

    def largest(chunk: int) -> int:
        def total(hidden: Any, head: Any) -> Any:
            return LOSSES[name][0](hidden, head, batch, chunk).terms[OTHER]

        program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(hidden, head)
        return max(sizes(program.jaxpr))[0]

    assert largest(10**6) == B * T * V
    assert largest(2) < B * T * V // 2


def test_noise_has_the_size_of_its_document() -> None:
    segments = np.repeat([1, 2, 0], [256, 64, 32])[None].astype(np.int32)
    found = np.asarray(noise(jax.random.key(0), jnp.asarray(segments), 64, ALPHA))
    assert not found[segments == 0].any()
    for segment, length in ((1, 256), (2, 64)):
        own, limit = found[segments == segment], ALPHA / np.sqrt(length * 64)
        assert 0.99 * limit < np.abs(own).max() <= limit
        # Uniform: no mean, and the variance of one.
        assert abs(own.mean()) < 4 * limit / np.sqrt(3 * own.size)
        assert own.var() == pytest.approx(limit**2 / 3, rel=0.05)


def test_noise_is_the_same_on_four_devices() -> None:
    segments = small_batch()["segments"]
    make = jax.jit(partial(noise, d_model=32, alpha=ALPHA))
    one = make(jax.random.key(1), jnp.asarray(segments))
    sharding = batch_sharding(make_mesh(2, 2))
    spread = make(jax.random.key(1), jax.device_put(segments, sharding))
    assert len(spread.sharding.device_set) == 4
    np.testing.assert_array_equal(one, spread)


def test_noise_is_that_of_a_table_with_noise_and_spares_evaluation() -> None:
    """Every token is an id of its own, so that a table can hold the noise."""
    model, params = small_model()
    batch: dict[str, Any] = small_batch(rows=2)
    key = jax.random.key(3)
    noisy = causal(model, 8, neftune_alpha=ALPHA)
    added = noise(jax.random.fold_in(key, 1), jnp.asarray(batch["segments"]), 32, ALPHA)
    size = batch["tokens"].size
    own = Decoder(replace(SPEC, vocab_size=size, tied=True))
    table = params["embed_tokens"]["embedding"]
    places = {**batch, "tokens": np.arange(size, dtype=np.int32).reshape(2, -1)}

    def naive(layers: Any) -> Any:
        rows = (table[batch["tokens"]] + added).reshape(size, -1)
        changed = {**params, "layers": layers, "embed_tokens": {"embedding": rows}}
        inputs = (places["tokens"], places["positions"], places["segments"])
        hidden = own.apply({"params": changed}, *inputs)
        return causal_lm(hidden, table.T, batch, 8).terms["nll"]

    def ours(layers: Any) -> Any:
        policy = {"params": {**params, "layers": layers}}
        return noisy.loss(policy, {}, batch, key).terms["nll"]

    found, expected = (jax.value_and_grad(f)(params["layers"]) for f in (ours, naive))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )
    policy = {"params": params}
    quiet, plain = (o.loss(policy, {}, batch, None) for o in (noisy, causal(model, 8)))
    assert float(quiet.terms["nll"]) == float(plain.terms["nll"]) != float(found[0])


@pytest.mark.parametrize("settings", [{"kind": "dft"}, {"label_smoothing": EPS}])
def test_evaluation_is_of_the_likelihood(settings: Any) -> None:
    model, params = small_model()
    batch, policy = small_batch(rows=2), {"params": params}
    other, plain = causal(model, 8, **settings), causal(model, 8)
    nll = float(plain.loss(policy, {}, batch, None).terms["nll"])
    evaluated = other.loss(policy, {}, batch, None)
    assert float(evaluated.terms[OTHER]) == float(evaluated.means["nll"].sum) == nll
    trained = other.loss(policy, {}, batch, jax.random.key(0))
    assert float(trained.terms[OTHER]) != nll
    assert float(trained.means["nll"].sum) == pytest.approx(nll, rel=1e-5)
    assert other.totals(batch).keys() == evaluated.terms.keys()


@pytest.mark.parametrize(
    "settings", [{"kind": "nil"}, {"kind": "dft", "label_smoothing": EPS}]
)
def test_refused(settings: Any) -> None:
    with pytest.raises(UserError):
        causal(Decoder(SPEC), 8, **settings)
