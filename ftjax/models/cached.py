"""The decoder with a key-value cache, for generation.

Training scans over stacked layers, which keeps compilation short. A scan inside the
loop over tokens would copy each layer's weights and cache slices at every token, so
here the layers are taken apart once, before the loop, and unrolled. The blocks and all
of their maths are those of `decoder`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ftjax.models import layers
from ftjax.models.decoder import Block, Decoder
from ftjax.models.spec import ModelSpec
from ftjax.weights import Array

Weights = dict[str, Any]  # 'layers': a list of variables; 'rest': those of the others
Cache = list[dict[str, Array]]  # per layer 'k' and 'v': [B, K, S, H]


def split_layers(variables: Any, dtype: Any) -> Weights:
    """The same variables, one dict of collections per layer.

    Float weights are cast to the dtype of the computation; codes stay packed.
    """
    params = jax.tree.map(lambda w: w.astype(dtype), variables["params"])
    trees = {**variables, "params": params}
    stack = {name: tree["layers"] for name, tree in trees.items() if "layers" in tree}
    count = jax.tree.leaves(stack)[0].shape[0]
    return {
        "layers": [jax.tree.map(lambda w, i=i: w[i], stack) for i in range(count)],
        "rest": {
            name: {key: value for key, value in tree.items() if key != "layers"}
            for name, tree in trees.items()
        },
    }


def init_cache(spec: ModelSpec, rows: int, slots: int, dtype: Any) -> Cache:
    shape = (rows, spec.n_kv_heads, slots, spec.head_dim)
    return [
        {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
        for _ in range(spec.n_layers)
    ]


def cached_logits(
    spec: ModelSpec,
    weights: Weights,
    tokens_BT: Array,
    slot: Array,
    start_B: Array,
    cache: Cache,
) -> tuple[Array, Cache]:
    """Float32 logits [B, V] after the last of T tokens, and the cache with them in it.

    Rows end together: row b begins at slot `start_B[b]`, so that slot s holds its
    position s - start_B[b], and what lies before is padding that nobody looks at.

    Args:
      spec: of the model.
      weights: from `split_layers`.
      tokens_BT: the next tokens of every row.
      slot: int32 [], where the first of them goes.
      start_B: int32 [B].
      cache: from `init_cache`, or from the call before.
    """
    rest = weights["rest"]
    dtype = cache[0]["k"].dtype
    model = Decoder(spec, dtype=dtype)
    queries = slot + jnp.arange(tokens_BT.shape[1])
    keys = jnp.arange(cache[0]["k"].shape[2])
    distance_TS = queries[:, None] - keys[None, :]
    begun_BS = keys[None, :] >= start_B[:, None]
    positions_BT = jnp.maximum(queries[None, :] - start_B[:, None], 0)
    cos, sin = layers.rope_angles(spec.rope, spec.head_dim, positions_BT)
    shared = {
        "mask": (distance_TS >= 0)[None] & begun_BS[:, None, :],
        "distance": distance_TS[None],
        "cos": cos,
        "sin": sin,
        "slot": slot,
    }
    x = model.apply(rest, tokens_BT, method=lambda m, t: m.embed_tokens(t))
    block, written = Block(spec, None), []
    for i, (tree, old) in enumerate(zip(weights["layers"], cache, strict=True)):
        layer: dict[str, Any] = {"cache": old}
        if spec.windows and spec.windows[i]:
            layer["window"] = spec.windows[i]
        if spec.rope_layers and not spec.rope_layers[i]:
            layer["rope"] = False
        x, new = block.apply(tree, x, layer, shared)
        written.append(new)
    last = model.apply(rest, x[:, -1:], method=lambda m, h: m.unembed(m.norm(h)))
    return last[:, 0], written
