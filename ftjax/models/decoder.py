"""One decoder for every family: pre-norm blocks, stacked and scanned.

Module names are the Hugging Face ones, so that a path is also a tensor name and a
target pattern. Shapes: B batch, T query, S key, D model, N heads, K kv heads, H head,
F ffn, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax.gradients import KEPT
from ftjax.models import layers
from ftjax.models.proj import Proj
from ftjax.models.spec import ModelSpec
from ftjax.models.vera import PAIR, Pair
from ftjax.quant.qtensor import QTensor
from ftjax.sharding import constrain_batch
from ftjax.weights import Array, Hidden

# Collections with layers.
LAYERED = ("params", "quant", "lora", "vera", "ia3", "adapters")
ADAPTERS = ("attn_adapter", "mlp_adapter")
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT),
}


class RMSNorm(nn.Module):
    """Learned root-mean-square norm; `axis` names the logical axis of its scale."""

    eps: float
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_partitioning(nn.initializers.ones, (self.axis,))
        return layers.rms_norm(x, self.param("scale", init, x.shape[-1:]), self.eps)


class Embed(nn.Module):
    """The token table, [V, D]."""

    vocab_size: int
    d_model: int
    dtype: Any

    def setup(self) -> None:
        init = nn.with_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocab_size, self.d_model))

    def __call__(self, tokens_BT: Array) -> Array:
        return jnp.take(self.embedding.astype(self.dtype), tokens_BT, axis=0)


class SelfAttention(nn.Module):
    """Rotary attention with grouped queries, over the row itself or over a cache."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x_BTD: Array, layer: Any, shared: Any) -> tuple[Array, Any]:
        s = self.spec
        q_shape = (s.d_model, s.n_heads, s.head_dim)
        kv_shape = (s.d_model, s.n_kv_heads, s.head_dim)
        q_axes, kv_axes = (("embed", n, "head") for n in ("heads", "kv_heads"))
        eqn, pair = "BTD,DNH->BTNH", shared.get(PAIR)
        q = Proj(eqn, q_shape, q_axes, s.qkv_bias, name="q_proj")(x_BTD, pair)
        k = Proj(eqn, kv_shape, kv_axes, s.qkv_bias, name="k_proj")(x_BTD, pair)
        v = Proj(eqn, kv_shape, kv_axes, s.qkv_bias, name="v_proj")(x_BTD, pair)
        if s.qk_norm:
            q = RMSNorm(s.norm_eps, None, name="q_norm")(q)
            k = RMSNorm(s.norm_eps, None, name="k_norm")(k)
        cos, sin = shared["cos"], shared["sin"]
        if "rope" in layer:
            cos, sin = (jnp.where(layer["rope"], a, n) for a, n in ((cos, 1), (sin, 0)))
        q, k = layers.rotate(q, cos, sin), layers.rotate(k, cos, sin)
        mask = shared["mask"]
        if "window" in layer:
            mask = mask & (shared["distance"] < layer["window"])
        cache = layer.get("cache")
        if "prefix" in layer:
            y = layers.prefixed_attention(q, k, v, mask, layer["prefix"])
        elif cache is None:
            y = layers.causal_attention(q, k, v, mask)
        else:
            cache = layers.write_cache(cache, k, v, shared["slot"])
            y = layers.cached_attention(q, cache["k"], cache["v"], mask)
        o_shape, o_axes = (q_shape[1], q_shape[2], s.d_model), (*q_axes[1:], "embed")
        out = Proj("BTNH,NHD->BTD", o_shape, o_axes, s.o_bias, name="o_proj")
        return out(y, pair), cache


class Mlp(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x_BTD: Array, pair: Pair | None) -> Array:
        s = self.spec
        shape, axes, eqn = (s.d_model, s.d_ff), ("embed", "mlp"), "BTD,DF->BTF"
        gate = Proj(eqn, shape, axes, s.mlp_bias, name="gate_proj")(x_BTD, pair)
        up = Proj(eqn, shape, axes, s.mlp_bias, name="up_proj")(x_BTD, pair)
        down = Proj(
            "BTF,FD->BTD", shape[::-1], axes[::-1], s.mlp_bias, name="down_proj"
        )
        return down(layers.swiglu(gate, up), pair)


class Adapter(nn.Module):
    """The hidden layer that the `adapters` collection has here, if it has one."""

    @nn.compact
    def __call__(self, y_BTD: Array) -> Array:
        hidden: Hidden | None = self.get_variable("adapters", "w")
        return y_BTD if hidden is None else hidden(y_BTD)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    spec: ModelSpec
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x_BTD: Array, layer: Any, shared: Any) -> tuple[Array, Any]:
        eps = self.spec.norm_eps
        normed = RMSNorm(eps, name="input_layernorm")(x_BTD)
        y, cache = SelfAttention(self.spec, name="self_attn")(normed, layer, shared)
        y = Adapter(name=ADAPTERS[0])(y)
        x = constrain_batch(x_BTD + y, self.mesh)
        normed = RMSNorm(eps, name="post_attention_layernorm")(x)
        y = Mlp(self.spec, name="mlp")(normed, shared.get(PAIR))
        y = Adapter(name=ADAPTERS[1])(y)
        return constrain_batch(x + y, self.mesh), cache


class Decoder(nn.Module):
    """Tokens to final hidden states; `head` and `logits` go on from there.

    Attributes:
      spec: the shape and the maths.
      dtype: of the computation; weights are cast to it where they are used.
      remat: 'none' keeps activations, 'full' keeps only each layer's input, 'dots'
        keeps the results of the projections.
      mesh: keeps activations split by rows; None on one device.
    """

    spec: ModelSpec
    dtype: Any = jnp.float32
    remat: str = "none"
    mesh: Mesh | None = None

    def setup(self) -> None:
        s = self.spec
        self.embed_tokens = Embed(s.vocab_size, s.d_model, self.dtype)
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        self.layers = nn.scan(
            block,
            variable_axes=dict.fromkeys(LAYERED, 0),
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=s.n_layers,
            metadata_params={nn.PARTITION_NAME: None},
        )(s, self.mesh)
        self.norm = RMSNorm(s.norm_eps)
        if not s.tied:
            shape = (s.d_model, s.vocab_size)
            self.lm_head = Proj("BTD,DV->BTV", shape, ("embed", "vocab"))

    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        segments_BT: Array,
        parents_BT: Array | None = None,
        noise_BTD: Array | None = None,
    ) -> Array:
        """Hidden states [B, T, D] after the final norm, for packed rows.

        A token sees its own document (`segments` equal), and what is its parent, if it
        has one. Noise is added to the embeddings. Virtual tokens (the `prompt`
        collection), or keys and values (`prefix`), stand before every document of a
        row, and shift its positions.
        """
        prompt_nD = self.get_variable("prompt", "tokens")
        prefix = {name: self.get_variable("prefix", name) for name in "kv"}
        layer, rows = self._per_layer(), (positions_BT, segments_BT, parents_BT)
        if prefix["k"] is not None:
            layer["prefix"] = prefix
            n = prefix["k"].shape[1]
            shared = self._shared(*rows, n, rotated=False)
        else:
            n = 0 if prompt_nD is None else len(prompt_nD)
            shared = self._shared(*rows, n, rotated=True)
        pair: Pair | None = self.get_variable("vera", PAIR)
        if pair is not None:
            shared[PAIR] = pair
        x = self.embed_tokens(tokens_BT)
        if noise_BTD is not None:
            x = x + noise_BTD.astype(x.dtype)
        if prompt_nD is not None:
            before = jnp.broadcast_to(prompt_nD[None], (len(x), *prompt_nD.shape))
            x = jnp.concatenate([before.astype(x.dtype), x], axis=1)
        x, _ = self.layers(constrain_batch(x, self.mesh), layer, shared)
        return self.norm(x if prompt_nD is None else x[:, n:])

    def _shared(
        self,
        positions_BT: Array,
        segments_BT: Array,
        parents_BT: Array | None,
        n: int,
        *,
        rotated: bool,
    ) -> dict[str, Any]:
        """What all layers share, of rows behind n virtual tokens.

        Those that are not `rotated` are a prefix: no window is too short for them.
        """
        s = self.spec
        index = jnp.arange(positions_BT.shape[1])
        distance = (index[:, None] - index[None, :])[None]
        places = positions_BT
        if parents_BT is not None:
            # Behind another answer, a parent is nearer than it stands.
            distance = places[:, :, None] - places[:, None, :]
        if n:
            ahead = jnp.broadcast_to(jnp.arange(n)[None], (len(positions_BT), n))
            places = jnp.concatenate([ahead, positions_BT + n], axis=1)
            segments_BT = jnp.pad(segments_BT, ((0, 0), (n, 0)))
            if parents_BT is not None:
                parents_BT = jnp.pad(parents_BT, ((0, 0), (n, 0)))
            distance = places[:, :, None] - places[:, None, :]
            if not rotated:
                distance = distance.at[:, :, :n].set(0)
                places = places[:, n:]
        cos, sin = layers.rope_angles(s.rope, s.head_dim, places)
        mask = layers.packed_mask(segments_BT, n, parents_BT)
        return {"mask": mask, "distance": distance, "cos": cos, "sin": sin}

    def _per_layer(self) -> dict[str, Any]:
        """What differs from layer to layer."""
        s = self.spec
        layer: dict[str, Any] = {}
        if any(s.windows):
            far = jnp.iinfo(jnp.int32).max
            layer["window"] = jnp.asarray([w or far for w in s.windows], jnp.int32)
        if not all(s.rope_layers):
            layer["rope"] = jnp.asarray(s.rope_layers)
        return layer

    def head(self) -> Array:
        """The output matrix [D, V]; the embedding's transpose where they are tied."""
        if self.spec.tied:
            return self.embed_tokens.embedding.T
        w = self.lm_head.w
        return w.dense(self.dtype) if isinstance(w, QTensor) else w

    def logits(
        self, tokens_BT: Array, positions_BT: Array, segments_BT: Array
    ) -> Array:
        """Float32 logits [B, T, V]: for tests and small calls, never in training."""
        return self.unembed(self(tokens_BT, positions_BT, segments_BT))

    def unembed(self, hidden_BTD: Array) -> Array:
        """Float32 logits of some hidden states."""
        if not self.spec.tied:
            return self.lm_head(hidden_BTD).astype(jnp.float32)
        table = self.embed_tokens.embedding.astype(hidden_BTD.dtype)
        return jnp.einsum("BTD,VD->BTV", hidden_BTD, table).astype(jnp.float32)


def hidden_and_head(
    model: Decoder,
    variables: Any,
    batch: Any,
    key: Array | None = None,
    noise_BTD: Array | None = None,
) -> tuple[Array, Array]:
    """What a loss on packed rows starts from: hidden states [B, T, D] and head [D, V].

    Args:
      variables: the policy: 'params', 'quant' where some of them are quantized, and
        'lora', 'vera', 'ia3', 'adapters', 'prompt' or 'prefix'; the base without these.
      batch: `tokens`, `positions` and `segments`, and `parents` where documents have
        any, int32 [B, T].
      key: draws the dropout; None in evaluation.
      noise_BTD: is added to the embeddings; None: nothing.
    """
    rngs = None if key is None else {"dropout": key}
    rows = (batch["tokens"], batch["positions"], batch["segments"])
    hidden = model.apply(variables, *rows, batch.get("parents"), noise_BTD, rngs=rngs)
    base = {name: variables[name] for name in ("params", "quant") if name in variables}
    return hidden, model.apply(base, method="head")
