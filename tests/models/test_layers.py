"""Attention, the gated product and rotation against plain float64 references."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.models.layers import attention, causal_attention, packed_mask, swiglu


def naive(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Softmax attention, written down: q [B, T, N, H], k and v [B, T, K, H]."""
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)


def inputs(length: int, heads: tuple[int, int], dtype: Any) -> list[jax.Array]:
    rng = np.random.default_rng(length)
    n, k = heads
    shapes = [
        (2, length, n, 8),
        (2, length, k, 8),
        (2, length, k, 8),
        (2, length, n, 8),
    ]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def segments(length: int) -> jax.Array:
    """Documents of uneven lengths, and in the second row padding at the end."""
    rows = np.ones((2, length), np.int32)
    rows[0, length // 3 :] = 2
    rows[0, length // 2 :] = 3
    rows[1, length - length // 4 :] = 0
    return jnp.asarray(rows)


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("length", [1, 24, 64, 100, 193])
def test_attention_is_the_naive_one(
    length: int, heads: tuple[int, int], window: int
) -> None:
    mask = packed_mask(segments(length))
    if window:
        index = np.arange(length)
        mask = mask & (index[:, None] - index[None, :] < window)[None]
    with jax.enable_x64(True):
        q, k, v, dout = inputs(length, heads, jnp.float64)

        @partial(jax.jit, static_argnums=0)
        def value(attend: Any, dout: Any, *qkv: Any) -> Any:
            out, pull = jax.vjp(lambda *a: attend(*a, mask), *qkv)
            return out, *pull(dout.astype(out.dtype))

        expected, found = (value(f, dout, q, k, v) for f in (naive, causal_attention))
        simple = jax.jit(attention)(q, k, v, mask)
    np.testing.assert_allclose(simple, expected[0], atol=2e-6)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        # The softmax is in float32 whatever the inputs are.
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_nothing_leaks_from_other_documents() -> None:
    q, k, v, _ = inputs(100, (4, 2), jnp.float32)
    mask = packed_mask(segments(100))

    def second_document(k: Any, v: Any) -> Any:
        return jnp.sum(causal_attention(q, k, v, mask)[0, 33:50] ** 2)

    for grad in jax.grad(second_document, argnums=(0, 1))(k, v):
        assert np.any(np.asarray(grad[0, 33:50]))
        assert not np.any(np.asarray(grad[0, :33]))
        assert not np.any(np.asarray(grad[0, 50:]))
        assert not np.any(np.asarray(grad[1]))


def test_bf16_attention_is_near_and_stays_bf16() -> None:
    q, k, v, dout = inputs(100, (4, 2), jnp.bfloat16)
    mask = packed_mask(segments(100))

    @partial(jax.jit, static_argnums=0)
    def value(attend: Any, dout: Any, *qkv: Any) -> Any:
        out, pull = jax.vjp(lambda *a: attend(*a, mask), *qkv)
        return out, *pull(dout)

    out, *grads = value(causal_attention, dout, q, k, v)
    wide = [x.astype(jnp.float32) for x in (dout, q, k, v)]
    expected, *wide_grads = value(naive, *wide)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)
    for found, wanted in zip(grads, wide_grads, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.15)


def test_swiglu_and_its_gradient() -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        gate, up, dy = (jnp.asarray(3 * rng.standard_normal((5, 7))) for _ in range(3))
        found, pull = jax.vjp(swiglu, gate, up)
        expected, plain = jax.vjp(lambda g, u: jax.nn.silu(g) * u, gate, up)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        for a, b in zip(pull(dy), plain(dy), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
        extreme = jnp.asarray([-800.0, 0.0, 800.0])
        grads = jax.grad(lambda g: jnp.sum(swiglu(g, jnp.ones(3))))(extreme)
        np.testing.assert_allclose(grads, [0, 0.5, 1], atol=1e-12)
