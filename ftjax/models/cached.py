"""The decoder with a key-value cache, for generation.

Training scans over stacked layers, which keeps compilation short. A scan inside the
loop over tokens would copy each layer's weights and cache slices at every token, so
here the layers are taken apart once, before the loop, and unrolled. The blocks and all
of their maths are those of `decoder`.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.models import layers
from ftjax.models.decoder import Block, Decoder
from ftjax.models.proj import Path, find
from ftjax.models.spec import ModelSpec
from ftjax.models.vera import PAIR, Vera, whole
from ftjax.weights import Array, Delta, is_stack

ADAPTERS = ("lora", "vera", "ia3", "prompt", "prefix")  # collections of PEFT's kinds
Weights = dict[str, Any]  # 'layers': a list of variables; 'rest': those of the others
Cache = list[dict[str, Array]]  # per layer 'k' and 'v': [B, K, S, H]
_norms = jax.jit(Delta.norms)


def split_layers(
    variables: Any, dtype: Any, *, release: bool = False, apart: bool = False
) -> Weights:
    """The same variables, one dict of collections per layer.

    Float weights are cast to the dtype of the computation, and get their updates added,
    in float32, before; beside a quantized base, codes stay packed and updates apart.
    So they do with `apart`, and where each row has its own.

    One array is taken at a time; with `release` it is given up then, so that the
    weights are never in memory twice.
    """
    updates = jax.tree.leaves(variables.get("lora"), is_leaf=is_stack)
    apart = apart or "quant" in variables or any(map(is_stack, updates))
    merged = () if apart else ("lora", "vera")
    deltas = {} if apart else _updates(variables)
    change = partial(_take, jnp.dtype(dtype).name, release)
    params = _walk(variables["params"], deltas, change)
    stack = {"params": params.pop("layers")}
    rest = {"params": params}
    for name, tree in variables.items():
        if name == "params" or name in merged:
            continue
        stack[name], rest[name] = _split(tree)
    count = len(jax.tree.leaves(stack["params"], is_leaf=_is_list)[0])
    layers = [_layer(stack, i) for i in range(count)]
    return {"layers": list(map(_with_norms, layers)), "rest": rest}


def _updates(variables: Any) -> Any:
    """What can be added to the weights, at their paths."""
    if "vera" in variables:
        return whole(variables["vera"])
    return variables.get("lora", {})


def with_lora(weights: Weights, lora: Any) -> Weights:
    """The same weights with another update beside them; None: with none.

    Of weights that were split `apart`: what was added to them stays added. Whatever
    else an adapter had put there is gone.
    """
    layers = [_without_adapter(w) for w in weights["layers"]]
    rest = _without_adapter(weights["rest"])
    if lora is not None:
        stack, rest["lora"] = _split(lora)
        for i, layer in enumerate(layers):
            layer["lora"] = _layer(stack, i)
    return {"layers": list(map(_with_norms, layers)), "rest": rest}


def _with_norms(layer: Any) -> Any:
    """A layer's variables with the norms of DoRA, which do not change any more."""

    def known(update: Any, path: Path) -> Any:
        if isinstance(update, dict):
            return {name: known(one, (*path, name)) for name, one in update.items()}
        if not isinstance(update, Delta) or update.m is None:
            return update
        codes = find(layer.get("quant"), path[:-1])
        w = find(layer["params"], path[:-1]) if codes is None else codes
        return replace(update, n=_norms(update, w))

    return {**layer, "lora": known(layer["lora"], ())} if "lora" in layer else layer


def _without_adapter(variables: Any) -> Any:
    return {name: tree for name, tree in variables.items() if name not in ADAPTERS}


def _split(tree: Any) -> tuple[Any, Any]:
    """A collection's layers, a list of arrays for each stack of them; and the rest."""
    stack = jax.tree.map(lambda x: list(_cut(x)), tree.get("layers", {}))
    return stack, {key: value for key, value in tree.items() if key != "layers"}


def _layer(stack: Any, i: int) -> Any:
    return jax.tree.map(lambda cut: cut[i], stack, is_leaf=_is_list)


def _walk(tree: Any, deltas: Any, change: Any, stacked: bool = False) -> Any:
    """`change(stacked, array, update)` of every array; updates are at its own path."""
    if not isinstance(tree, dict):
        return change(stacked, tree, deltas or None)
    return {
        key: _walk(value, deltas.get(key, {}), change, stacked or key == "layers")
        for key, value in tree.items()
    }


def _take(dtype: str, release: bool, stacked: bool, w: Array, delta: Any) -> Any:
    """One array, updated and cast; one per layer if it is a stack of them."""
    changed = w
    if stacked or delta is not None or w.dtype != dtype:
        changed = jax.block_until_ready(_changed(w, delta, dtype, stacked))
    if release and changed is not w:
        w.delete()
    return changed


@partial(jax.jit, static_argnames=("dtype", "stacked"))
def _changed(w: Array, delta: Delta | Vera | None, dtype: str, stacked: bool) -> Any:
    if delta is not None:
        w = delta.applied(w)
    w = w.astype(dtype)
    return _cut(w) if stacked else w


def _cut(stack: Array) -> list[Array]:
    return [stack[i] for i in range(stack.shape[0])]


def _is_list(node: Any) -> bool:
    return isinstance(node, list)


def init_cache(
    spec: ModelSpec, rows: int, slots: int, dtype: Any, weights: Weights | None = None
) -> Cache:
    """Room for `slots` tokens a row, behind the virtual ones that `weights` have."""
    n = virtual_tokens(weights)
    shape = (rows, spec.n_kv_heads, n + slots, spec.head_dim)
    cache = [
        {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
        for _ in range(spec.n_layers)
    ]
    if weights is None or not n:
        return cache
    if "prompt" in weights["rest"]:
        before = _read_prompt(spec, weights, dtype)
    else:
        prefix = {k: x.swapaxes(1, 2) for k, x in weights["rest"]["prefix"].items()}
        before = [
            {k: x_LKnH[i][None] for k, x_LKnH in prefix.items()}
            for i in range(spec.n_layers)
        ]
    return [
        {k: x.at[:, :, :n].set(first[k].astype(dtype)) for k, x in layer.items()}
        for layer, first in zip(cache, before, strict=True)
    ]


def virtual_tokens(weights: Weights | None) -> int:
    """How many stand before every row."""
    rest = {} if weights is None else weights["rest"]
    if "prompt" in rest:
        return len(rest["prompt"]["tokens"])
    return rest["prefix"]["k"].shape[1] if "prefix" in rest else 0


def _read_prompt(spec: ModelSpec, weights: Weights, dtype: Any) -> Cache:
    """The keys and values of the virtual tokens, the same for every row."""
    prompt_1nD = weights["rest"]["prompt"]["tokens"].astype(dtype)[None]
    n = prompt_1nD.shape[1]
    index = jnp.arange(n)
    cos, sin = layers.rope_angles(spec.rope, spec.head_dim, index[None])
    distance = (index[:, None] - index[None, :])[None]
    shared = {"mask": distance >= 0, "distance": distance, "cos": cos, "sin": sin}
    empty = init_cache(spec, 1, n, dtype)
    shared["slot"] = jnp.zeros((), jnp.int32)
    return _run(spec, weights, prompt_1nD, shared, empty)[1]


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
    position s - start_B[b], and what lies before is of nobody. The cache is a ring: of
    S slots, the last S are in it. The virtual tokens of a prompt or a prefix lie before
    the ring, and shift positions.

    Args:
      spec: of the model.
      weights: from `split_layers`.
      tokens_BT: the next tokens of every row.
      slot: int32 [], where the first of them goes; of more than one, all lie in the
        first round of the ring.
      start_B: int32 [B], at least 0.
      cache: from `init_cache`, or from the call before.
    """
    rest = weights["rest"]
    dtype = cache[0]["k"].dtype
    model = Decoder(spec, dtype=dtype)
    n = virtual_tokens(weights)
    queries = slot + jnp.arange(tokens_BT.shape[1])
    keys = jnp.arange(cache[0]["k"].shape[2]) - n
    size = len(keys) - n
    distance = ((queries[:, None] - keys[None, :]) % size)[None]
    held = queries[None, :, None] - distance  # the slot that a key is of, as seen here
    mask = held >= start_B[:, None, None]
    positions_BT = jnp.maximum(queries[None, :] - start_B[:, None], 0) + n
    if n:
        virtual = (keys < 0)[None, None]
        mask |= virtual
        ahead = positions_BT[:, :, None] - (keys + n)[None, None]
        distance = jnp.where(virtual, 0 if "prefix" in rest else ahead, distance)
    cos, sin = layers.rope_angles(spec.rope, spec.head_dim, positions_BT)
    shared = {"mask": mask, "distance": distance, "cos": cos, "sin": sin}
    shared["slot"] = slot % size + n
    x = model.apply(rest, tokens_BT, method=lambda m, t: m.embed_tokens(t))
    x, written = _run(spec, weights, x, shared, cache)
    last = model.apply(rest, x[:, -1:], method=lambda m, h: m.unembed(m.norm(h)))
    return last[:, 0], written


def _run(
    spec: ModelSpec, weights: Weights, x: Array, shared: Any, cache: Cache
) -> tuple[Array, Cache]:
    """x [B, T, D] through all the blocks, and the cache with its keys and values."""
    block, written = Block(spec, None), []
    pair = weights["rest"].get("vera", {}).get(PAIR)
    shared = shared if pair is None else {**shared, PAIR: pair}
    for i, (tree, old) in enumerate(zip(weights["layers"], cache, strict=True)):
        layer: dict[str, Any] = {"cache": old}
        if spec.windows and spec.windows[i]:
            layer["window"] = spec.windows[i]
        if spec.rope_layers and not spec.rope_layers[i]:
            layer["rope"] = False
        x, new = block.apply(tree, x, layer, shared)
        written.append(new)
    return x, written
