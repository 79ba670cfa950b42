"""The layers as functions of arrays: norm, rotary embedding, attention."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.gradients import keep, settled
from ftjax.models.spec import Rope
from ftjax.weights import Array


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis, in float32 (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    normed = (x32 * jax.lax.rsqrt(mean + eps)).astype(x.dtype)
    scale = scale.astype(x.dtype)
    return normed * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """The angle per position of each pair of the head: float32 [head_dim / 2].

    'llama3' and 'yarn' as transformers' `modeling_rope_utils` defines them.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freq = (1.0 / (rope.theta ** exponent.astype(np.float64))).astype(np.float32)
    if rope.kind == "linear":
        return freq / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(freq, rope)
    if rope.kind == "yarn":
        return _yarn(freq, rope, head_dim)
    return freq


def _llama3(freq: np.ndarray, rope: Rope) -> np.ndarray:
    wavelength = 2 * np.pi / freq
    low = rope.original_max_positions / rope.low_freq_factor
    high = rope.original_max_positions / rope.high_freq_factor
    smooth = rope.original_max_positions / wavelength - rope.low_freq_factor
    smooth = smooth / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * freq / rope.factor + smooth * freq
    scaled = np.where(wavelength > low, freq / rope.factor, freq)
    between = (wavelength <= low) & (wavelength >= high)
    return np.where(between, blended, scaled).astype(np.float32)


def _yarn(freq: np.ndarray, rope: Rope, head_dim: int) -> np.ndarray:
    def dimension(rotations: float) -> float:
        ratio = rope.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low or 0.001
    ramp = np.clip((np.arange(head_dim // 2) - low) / span, 0, 1)
    return (freq / rope.factor * ramp + freq * (1 - ramp)).astype(np.float32)


def rope_angles(rope: Rope, head_dim: int, positions_BT: Array) -> tuple[Array, Array]:
    """cos and sin, float32 [B, T, head_dim / 2], for the given positions."""
    freq = jnp.asarray(rope_frequencies(rope, head_dim))
    angles = positions_BT.astype(jnp.float32)[..., None] * freq[None, None, :]
    scale = np.float32(rope.attention_factor)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x_BTNH: Array, cos_BTh: Array, sin_BTh: Array) -> Array:
    """Rotates the two halves of each head against each other (GPT-NeoX's layout)."""
    half = x_BTNH.shape[-1] // 2
    cos, sin = (a[:, :, None, :].astype(x_BTNH.dtype) for a in (cos_BTh, sin_BTh))
    a, b = x_BTNH[..., :half], x_BTNH[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up (arXiv 2002.05202); keeps its two arguments and nothing else."""
    return gate * jax.nn.sigmoid(gate) * up


def _swiglu_forward(gate: Array, up: Array) -> tuple[Array, Any]:
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(saved: Any, dy: Array) -> tuple[Array, Array]:
    gate, up = saved
    s = jax.nn.sigmoid(gate)
    silu = gate * s
    return dy * up * (s + silu * (1 - s)), dy * silu


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def packed_mask(
    segments_BT: Array, virtual: int = 0, parents_BT: Array | None = None
) -> Array:
    """Who may look at whom in packed rows: bool [B, T, T].

    Backwards only, and only inside one document (`segments` equal) and what is its
    parent (0: none). The first `virtual` columns are no tokens of the row: every
    document begins with them.
    """
    length = segments_BT.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    if parents_BT is not None:
        above = parents_BT[:, :, None] == segments_BT[:, None, :]
        same |= above & (parents_BT > 0)[:, :, None]
    if virtual:
        same |= (jnp.arange(length) < virtual)[None, None, :]
    return same & causal[None, :, :]


def attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array) -> Array:
    """Softmax attention with grouped queries: [B, T, N, H]; softmax in float32."""
    q, k, v = _by_head(q_BTNH, k_BSKH.shape[2]), _by_head(k_BSKH), _by_head(v_BSKH)
    out, _ = _attend(q, k, v, mask_BTS)
    return _by_token(out, q_BTNH.shape)


def causal_attention(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, mask_BTT: Array
) -> Array:
    """`attention` of a row to itself, where the mask allows nothing after the query.

    Works through blocks of queries, each over the keys up to its end, and keeps no
    attention weights for the backward pass: they are computed again from the saved
    log-normalizers, as in FlashAttention (arXiv 2205.14135).
    """
    q, k, v = _by_head(q_BTNH, k_BTKH.shape[2]), _by_head(k_BTKH), _by_head(v_BTKH)
    return _by_token(_causal(q, k, v, mask_BTT), q_BTNH.shape)


def prefixed_attention(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, mask_BSS: Array, prefix: Any
) -> Array:
    """`causal_attention` of rows that begin with keys and values 'k' and 'v' [n, K, H].

    S is n + T. The prefix gets queries too, whose results are dropped: so the blocks
    and their gradients stay those of a row without one.
    """
    rows, _, heads, dim = q_BTNH.shape
    before = {
        name: jnp.broadcast_to(x.astype(q_BTNH.dtype)[None], (rows, *x.shape))
        for name, x in prefix.items()
    }
    n = prefix["k"].shape[0]
    nobody = jnp.zeros((rows, n, heads, dim), q_BTNH.dtype)
    q = jnp.concatenate([nobody, q_BTNH], axis=1)
    k = jnp.concatenate([before["k"], k_BTKH], axis=1)
    v = jnp.concatenate([before["v"], v_BTKH], axis=1)
    return causal_attention(q, k, v, mask_BSS)[:, n:]


def cached_attention(
    q_BTNH: Array, k_BKSH: Array, v_BKSH: Array, mask_BTS: Array
) -> Array:
    """`attention` over keys and values that lie head by head, as a cache keeps them."""
    q, k, v = _by_head(q_BTNH, k_BKSH.shape[1]), k_BKSH[:, :, None], v_BKSH[:, :, None]
    out, _ = _attend(q, k, v, mask_BTS)
    return _by_token(out, q_BTNH.shape)


def write_cache(
    cache: dict[str, Array], k_BTKH: Array, v_BTKH: Array, slot: Array
) -> dict[str, Array]:
    """A layer's cache ('k' and 'v', [B, K, S, H]) with T slots written.

    All rows write to the same slots: a copy of a few numbers, in place. A slot of its
    own for each row would be a scatter, which on a CPU costs more than the attention.
    """
    new = {"k": k_BTKH, "v": v_BTKH}
    return {
        name: jax.lax.dynamic_update_slice_in_dim(
            old, new[name].transpose(0, 2, 1, 3).astype(old.dtype), slot, axis=2
        )
        for name, old in cache.items()
    }


def _by_head(x_BTNH: Array, kv_heads: int = 0) -> Array:
    """[B, K, G, T, H]: the heads that share a key side by side (G of them)."""
    batch, length, heads, dim = x_BTNH.shape
    grouped = x_BTNH.reshape(batch, length, kv_heads or heads, -1, dim)
    return grouped.transpose(0, 2, 3, 1, 4)


def _by_token(x_BKGTH: Array, shape: tuple[int, ...]) -> Array:
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(shape)


def _scores(q_BKGTH: Array, k_BKSH: Array, mask_BTS: Array) -> Array:
    """Scaled, masked scores, float32 [B, K, G, T, S]: one matmul per key head."""
    batch, heads, groups, length, dim = q_BKGTH.shape
    q = (q_BKGTH * np.asarray(dim**-0.5, q_BKGTH.dtype)).reshape(batch, heads, -1, dim)
    scores = jnp.einsum(
        "bkth,bksh->bkts", q, k_BKSH, preferred_element_type=jnp.float32
    )
    scores = scores.reshape(batch, heads, groups, length, -1)
    return jnp.where(mask_BTS[:, None, None], scores, jnp.float32(-1e30))


def _attend(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
    """The result [B, K, G, T, H], and the log-normalizers [B, K, G, T, 1]."""
    k, v = k[:, :, 0], v[:, :, 0]
    scores = _scores(q, k, mask)
    top = jnp.max(scores, axis=-1, keepdims=True)
    exps = jnp.exp(scores - top)
    norm = jnp.sum(exps, axis=-1, keepdims=True)
    flat = exps.astype(v.dtype).reshape(*exps.shape[:2], -1, exps.shape[-1])
    out = jnp.einsum("bkts,bksh->bkth", flat, v).reshape(q.shape)
    return out / norm.astype(out.dtype), top + jnp.log(norm)


def _blocks(length: int) -> list[tuple[int, int]]:
    """At most eight blocks of queries, of 64 or more."""
    size = max(64, -(-length // 8))
    return [(i, min(i + size, length)) for i in range(0, length, size)]


@jax.custom_vjp
def _causal(q: Array, k: Array, v: Array, mask: Array) -> Array:
    return _causal_forward(q, k, v, mask)[0]


def _causal_forward(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Any]:
    parts = [
        _attend(q[..., i:j, :], k[..., :j, :], v[..., :j, :], mask[:, i:j, :j])
        for i, j in _blocks(q.shape[3])
    ]
    out, lse = (
        keep(jnp.concatenate(part, axis=3)) for part in zip(*parts, strict=True)
    )
    return out, (q, k, v, mask, out, lse)


def _causal_backward(saved: Any, dout: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, out, lse = saved
    # sum_s p_ts dp_ts of the softmax gradient, without the weights p.
    inner = jnp.sum(
        (dout * out).astype(jnp.float32), axis=-1, keepdims=True, dtype=jnp.float32
    )
    scale = np.asarray(q.shape[-1] ** -0.5, q.dtype)
    shape_BKHS = tuple(k.shape[i] for i in (0, 1, 4, 3))
    dk, dv, dq = jnp.zeros(shape_BKHS, k.dtype), jnp.zeros(shape_BKHS, v.dtype), []
    for i, j in _blocks(q.shape[3]):
        kj, vj = k[:, :, 0, :j], v[:, :, 0, :j]
        q_part, do = q[..., i:j, :], _flat(dout[..., i:j, :])
        p = jnp.exp(_scores(q_part, kj, mask[:, i:j, :j]) - lse[..., i:j, :])
        dp = jnp.einsum("bkth,bksh->bkts", do, vj, preferred_element_type=jnp.float32)
        ds = p * (dp.reshape(p.shape) - inner[..., i:j, :])
        p, ds = _flat(p.astype(q.dtype)), _flat(ds.astype(q.dtype))
        dv = dv.at[..., :j].add(_sum_over_queries(do, p))
        dk = dk.at[..., :j].add(_sum_over_queries(_flat(q_part), ds))
        dq.append(jnp.einsum("bkts,bksh->bkth", ds, kj).reshape(q_part.shape))
    dk, dv = (d.swapaxes(2, 3)[:, :, None] for d in (dk * scale, dv))
    return jnp.concatenate(dq, axis=3) * scale, dk, dv, None


def _sum_over_queries(x_BKtH: Array, p_BKts: Array) -> Array:
    """[B, K, H, s], with the narrower of the two transposed."""
    return jnp.einsum("bkht,bkts->bkhs", settled(x_BKtH.swapaxes(2, 3)), p_BKts)


def _flat(x_BKGTs: Array) -> Array:
    """[B, K, G*T, ...]: the queries of a group in one matrix."""
    return x_BKGTs.reshape(*x_BKGTs.shape[:2], -1, x_BKGTs.shape[-1])


_causal.defvjp(_causal_forward, _causal_backward)
