"""DoRA: it begins as its base, its norm is a constant, and it merges; PEFT's dropout.

What PEFT computes with the same numbers is in `tests/checkpoints/test_peft.py`.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import method_config
from ftjax.methods.dora import with_magnitudes
from ftjax.methods.lora import LoraPlan, lora_axes, merge
from ftjax.methods.method import plan_method
from ftjax.methods.quant import dequantize
from ftjax.models.cached import cached_logits, init_cache, split_layers, with_lora
from ftjax.models.decoder import Decoder, hidden_and_head
from ftjax.models.proj import Proj
from ftjax.optim import decayed
from ftjax.sharding import make_mesh, shard_tree
from ftjax.weights import Delta
from tests.models_small import SPEC, moved, nll, small_batch, small_lora, small_model
from tests.quant.test_model import quantized

PATTERN = {
    "targets": r"layers\.1\..*q_proj,o_proj,down_proj",
    "rank_pattern": "layers.0.*o_proj=2",
}


def dora(base: Any, *, live: bool = False, **changes: Any) -> tuple[LoraPlan, Any]:
    """(plan, collection); `live` moves `a`, `b` and the magnitudes."""
    plan, lora = small_lora(small_model()[0], use_dora=True, **(PATTERN | changes))
    lora = with_magnitudes(lora, plan, base)
    if live:
        lora = jax.tree.map(alive, lora, is_leaf=is_delta)
    return plan, lora


def alive(delta: Delta) -> Delta:
    start = np.asarray(delta.m)
    wave = 1 + 0.3 * np.sin(np.arange(start.size, dtype=np.float32))
    used_Lr = np.any(delta.a != 0, axis=tuple(range(1, delta.a.ndim - 1)))
    gap = [1] * (delta.b.ndim - 2)
    b = np.where(used_Lr.reshape(*used_Lr.shape, *gap), moved(delta.b), 0)
    return replace(
        delta, b=jnp.asarray(b), m=jnp.asarray(start * wave.reshape(start.shape))
    )


def is_delta(leaf: Any) -> bool:
    return isinstance(leaf, Delta)


def hidden(variables: Any, **model: Any) -> np.ndarray:
    found = hidden_and_head(Decoder(SPEC, **model), variables, small_batch())[0]
    return np.asarray(found, np.float32)


def bases() -> dict[str, Any]:
    model, params = small_model()
    return {
        "float": {"params": params},
        "nf4": quantized(model, params, group=32, double_quant=True),
    }


@pytest.mark.parametrize("kind", ["float", "nf4"])
def test_begins_as_its_base_and_merges(kind: str) -> None:
    base = bases()[kind]
    start = hidden({**base, "lora": dora(base)[1]})
    np.testing.assert_allclose(start, hidden(base), atol=3e-6)
    lora = dora(base, live=True)[1]
    policy = hidden({**base, "lora": lora})
    assert np.abs(policy - start).max() > 0.1
    params = dequantize(base["params"], base.get("quant", {}))
    merged = {"params": merge(params, lora)}
    np.testing.assert_allclose(hidden(merged), policy, atol=3e-5)
    # The magnitude alone rescales: without it this is another model.
    plain = jax.tree.map(lambda d: replace(d, m=None), lora, is_leaf=is_delta)
    assert np.abs(hidden({**base, "lora": plain}) - policy).max() > 0.1


@pytest.mark.parametrize("kind", ["float", "nf4"])
def test_generation_knows_the_norms(kind: str) -> None:
    base = bases()[kind]
    variables = {**base, "lora": dora(base, live=True)[1]}
    tokens, zero = jnp.asarray([[5, 6, 7, 8], [1, 2, 3, 4]]), jnp.zeros((), jnp.int32)
    rows = (tokens, jnp.tile(jnp.arange(4), (2, 1)), jnp.ones_like(tokens))
    wanted = Decoder(SPEC).apply(variables, *rows, method="logits")[:, -1]
    apart = split_layers(variables, jnp.float32, apart=True)
    later = with_lora(split_layers(base, jnp.float32, apart=True), variables["lora"])
    for weights in (split_layers(variables, jnp.float32), apart, later):
        cache = init_cache(SPEC, 2, 8, jnp.float32)
        start = jnp.zeros(2, jnp.int32)
        found, _ = cached_logits(SPEC, weights, tokens, zero, start, cache)
        np.testing.assert_allclose(found, wanted, atol=3e-5)
    known = [d.n for d in jax.tree.leaves(apart["layers"], is_leaf=is_delta)
             if is_delta(d)]  # fmt: skip
    assert known and all(n is not None for n in known)


def grads(lora: Any, base: Any, **model: Any) -> Any:
    decoder, key = Decoder(SPEC, **model), jax.random.key(0)
    return jax.jit(
        jax.grad(lambda lora: nll(decoder, {**base, "lora": lora}, small_batch(), key))
    )(lora)


def test_gradients_reach_magnitudes_but_not_layers_without_an_update() -> None:
    base = bases()["float"]
    plan, lora = dora(base, live=True)
    found = grads(lora, base)["layers"]
    assert plan.sites["layers", "self_attn", "q_proj"].ranks == (0, 4)
    q = found["self_attn"]["q_proj"]["w"]
    assert not np.any(q.m[0]) and np.all(q.m[1] != 0)
    assert np.all(found["mlp"]["down_proj"]["w"].m != 0)
    assert not np.any(found["self_attn"]["o_proj"]["w"].b[0, 2:])
    assert not np.any(q.scale)
    flags = decayed({"lora": lora})["lora"]["layers"]["mlp"]["down_proj"]["w"]
    assert (flags.a, flags.b, flags.m) == (True, True, False)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_and_codes_change_no_gradient(remat: str) -> None:
    base = bases()["nf4"]
    dense = {"params": dequantize(base["params"], base["quant"])}
    lora = dora(base, live=True)[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        grads(lora, base, remat=remat),
        grads(lora, dense),
    )


@pytest.mark.parametrize("tokens", [4, 80])
def test_dropout_is_pefts(tokens: int) -> None:
    """base(x) + (m / n - 1) W drop(x) + m / n * s B A drop(x)."""
    eqn, rng = "BTD,DF->BTF", np.random.default_rng(0)
    x, w, a, b, m, bias = (
        jnp.asarray(rng.normal(0, 1, shape), jnp.float32)
        for shape in ((1, tokens, 12), (12, 10), (12, 3), (3, 10), (10,), (10,))
    )
    delta = Delta(a, b, jnp.float32(0.7), 0.4, m)
    variables = {"params": {"w": w, "b": bias}, "lora": {"w": delta}}
    site = Proj(eqn, (12, 10), ("embed", "mlp"), bias=True)
    key = jax.random.key(3)
    found = site.apply(variables, x, rngs={"dropout": key})
    kept = site.apply(
        variables, x, rngs={"dropout": key}, method=lambda s, x: delta.drop(
            x, s.make_rng("dropout"))
    )  # fmt: skip
    gain = m / jnp.linalg.norm(w + 0.7 * a @ b, axis=0)
    wanted = x @ w + bias[None, None] + (gain - 1)[None, None] * (kept @ w)
    wanted += gain[None, None] * 0.7 * (kept @ a @ b)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert np.abs(found - site.apply(variables, x)).max() > 0.1


@pytest.mark.parametrize("tokens", [4, 80])
def test_the_norm_is_a_constant(tokens: int) -> None:
    """Every gradient is that with the norm written down as a number."""
    rng = np.random.default_rng(1)
    x, w, *rest = (
        jnp.asarray(rng.normal(0, 1, shape), jnp.float32)
        for shape in ((1, tokens, 12), (12, 10), (12, 3), (3, 10), (10,))
    )
    scale, site = jnp.float32(0.7), Proj("BTD,DF->BTF", (12, 10), ("embed", "mlp"))
    norm = jnp.linalg.norm(w + 0.7 * rest[0] @ rest[1], axis=0)

    def ours(x: Any, a: Any, b: Any, m: Any) -> Any:
        variables = {"params": {"w": w}, "lora": {"w": Delta(a, b, scale, 0.0, m)}}
        return jnp.sum(jnp.sin(site.apply(variables, x)))

    def fixed(x: Any, a: Any, b: Any, m: Any) -> Any:
        y = (m / norm)[None, None] * (x @ (w + 0.7 * a @ b))
        return jnp.sum(jnp.sin(y))

    found, wanted = (jax.grad(f, (0, 1, 2, 3))(x, *rest) for f in (ours, fixed))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_a_bfloat16_computation_is_near_that_in_float32() -> None:
    base = bases()["float"]
    variables = {**base, "lora": dora(base, live=True)[1]}
    exact, rounded = hidden(variables), hidden(variables, dtype=jnp.bfloat16)
    np.testing.assert_allclose(rounded, exact, atol=0.12)


def test_on_a_mesh_it_is_the_same_and_split() -> None:
    base = bases()["float"]
    plan, lora = dora(base, live=True)
    mesh = make_mesh(1, 4)
    spread = jax.device_put(lora, shard_tree(lora, lora_axes(plan), mesh))
    m = spread["layers"]["mlp"]["down_proj"]["w"].m
    assert not m.sharding.is_fully_replicated
    one, many = (grads(x, base) for x in (lora, spread))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, many)


def test_the_method_counts_its_magnitudes() -> None:
    model, params = small_model()
    settings = method_config("lora").to_dict()
    counts, trees = [], []
    for use in (False, True):
        config = SimpleNamespace(**(settings | {"use_dora": use, "rank": 2}))
        method = plan_method(model, config)
        trained, _ = method.start({"params": params}, 0)
        jax.tree.map(
            lambda x, s: x.shape == s.shape or pytest.fail(f"{x.shape} {s.shape}"),
            trained,
            {"lora": method.parts["lora"].shapes},
        )
        counts.append(method.count)
        trees.append(sum(x.size for x in jax.tree.leaves(trained)))
    outputs = SPEC.n_layers * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    assert counts[1] - counts[0] == trees[1] - trees[0] == outputs
