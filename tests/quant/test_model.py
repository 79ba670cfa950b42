"""A quantized base is the model of its dequantized weights, in less memory."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import method_config
from ftjax.decoding.generator import Generator
from ftjax.methods.method import plan_method
from ftjax.methods.quant import (
    abstract_quant,
    dequantize,
    plan_quant,
    quant_axes,
    without,
)
from ftjax.models.cached import cached_logits, init_cache, split_layers
from ftjax.models.decoder import Decoder
from ftjax.models.proj import Path, find_sites, init_params, params_axes, put
from ftjax.quant.formats import Format
from ftjax.quant.qtensor import quantize
from ftjax.sharding import make_mesh, shard_tree
from ftjax.weights import join
from tests.models_small import SPEC, moved, nll, small_batch, small_lora, small_model

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"format": "nf4", "group": 32},
    "nf4-across-rows": {"format": "nf4"},
    "nf4-double": {"format": "nf4", "group": 32, "double_quant": True},
    "fp4": {"format": "fp4", "group": 32},
    "int8": {"format": "int8"},
    "int8-affine": {"format": "int8", "scheme": "affine", "group": 16},
    "int4": {"format": "int4", "group": 16},
    "int4-affine": {"format": "int4", "scheme": "affine", "group": 0},
    "mixed": {"format": "nf4", "group": 32, "pattern": "down_proj=int8,q_proj=none"},
}


def quant_config(**changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "format": "nf4",
        "group": -1,
        "scheme": "symmetric",
        "double_quant": False,
        "targets": "all-linear",
        "pattern": "",
    }
    return SimpleNamespace(**(values | changes))


def quantized(model: Decoder, params: Any, **changes: Any) -> dict[str, Any]:
    """{'params': what stays, 'quant': ...} of a model's float weights."""
    sites = find_sites(model)
    plan = plan_quant(sites, quant_config(**changes))
    quant: dict[str, Any] = {}
    for path, fmt in plan.items():
        site = sites[path]
        stack = np.asarray(get(params, (*path, "w")))
        stack = stack.reshape(-1, int(np.prod(site.inputs)), int(np.prod(site.outputs)))
        layers = [quantize(w.T, site.inputs, site.outputs, fmt) for w in stack]
        if site.layers is None:
            put(quant, path, {"w": layers[0]})
        else:
            one = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *layers)
            put(quant, path, {"w": one})
    return {"params": without(params, plan), "quant": quant}


def get(tree: Any, path: Path) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def loss_and_grads(model: Decoder, base: Any, lora: Any) -> tuple[Any, Any]:
    batch, key = small_batch(), jax.random.key(0)

    def objective(lora: Any) -> Any:
        return nll(model, {**base, "lora": lora}, batch, key)

    return jax.jit(jax.value_and_grad(objective))(lora)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_dense_weights(kind: str) -> None:
    model, params = small_model()
    lora = small_lora(model, live=True)[1]
    base = quantized(model, params, **KINDS[kind])
    dense = {"params": dequantize(base["params"], base["quant"])}
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), dense["params"], params)
    assert any(jax.tree.leaves(changed)), "quantization changed nothing"
    found, wanted = (loss_and_grads(model, b, lora) for b in (base, dense))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found[1],
        wanted[1],
    )


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_bfloat16_and_remat(remat: str) -> None:
    model, params = small_model(dtype=jnp.bfloat16, remat=remat)
    lora = small_lora(model, live=True, dropout=0.1)[1]
    base = quantized(model, params, **KINDS["nf4-double"])
    dense = {"params": dequantize(base["params"], base["quant"])}
    found, wanted = (loss_and_grads(model, b, lora) for b in (base, dense))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)


def carried(jaxpr: Any) -> Iterator[int]:
    """The sizes of what every scan hands on: its outputs, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield from (int(np.prod(v.aval.shape)) for v in eqn.outvars)
        for param in eqn.params.values():
            for part in param if isinstance(param, tuple | list) else (param,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from carried(inner)


def temporary(lowered: Any) -> int:
    """Bytes that a computation needs beside its arguments and results."""
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_no_dense_weight_waits_for_the_backward_pass(kind: str, remat: str) -> None:
    spec = replace(SPEC, n_layers=16, d_model=64, d_ff=320)
    model = Decoder(spec, remat=remat)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    sites, changes = find_sites(model), KINDS[kind]
    plan = plan_quant(sites, quant_config(**changes))
    base = {"params": without(params, plan), "quant": abstract_quant(sites, plan)}
    lora = small_lora(model)[1]
    batch = small_batch(rows=2, length=12)

    def objective(lora: Any, base: Any) -> Any:
        return nll(model, {**base, "lora": lora}, batch, jax.random.key(0))

    step = jax.value_and_grad(objective)
    dense = spec.n_layers * spec.d_model * spec.d_ff
    assert dense not in set(carried(jax.make_jaxpr(step)(lora, base).jaxpr))
    used, usual = (
        temporary(jax.jit(step).lower(lora, b)) for b in (base, {"params": params})
    )
    everything = 4 * sum(int(np.prod(get(params, (*path, "w")).shape)) for path in plan)
    # Beside what a float base takes: the dense copies of one layer, not of sixteen.
    assert used < usual + everything / 6, (used, usual, everything)


def test_the_walk_sees_dense_weights_where_they_wait() -> None:
    """The same look at a model that is not quantized by us but in the open."""
    model, params = small_model()
    base = quantized(model, params)
    lora = small_lora(model)[1]
    batch = small_batch(rows=2, length=12)

    def objective(lora: Any) -> Any:
        def body(total: Any, codes: Any) -> Any:
            return total + jnp.sum(jnp.sin(codes.dense() * lora_scale(lora))), None

        w = base["quant"]["layers"]["mlp"]["up_proj"]["w"]
        extra, _ = jax.lax.scan(body, jnp.zeros(()), w)
        variables = {**base, "lora": lora}
        return extra + nll(model, variables, batch, jax.random.key(0))

    dense = SPEC.n_layers * SPEC.d_model * SPEC.d_ff
    assert dense in set(
        carried(jax.make_jaxpr(jax.value_and_grad(objective))(lora).jaxpr)
    )


def lora_scale(lora: Any) -> Any:
    return jnp.sum(lora["layers"]["mlp"]["up_proj"]["w"].a)


@pytest.mark.parametrize("kind", ["nf4-double", "nf4-across-rows", "int4-affine"])
def test_shapes_and_axes_are_those_of_the_arrays(kind: str) -> None:
    model, params = small_model()
    sites = find_sites(model)
    plan = plan_quant(sites, quant_config(**KINDS[kind]))
    base = quantized(model, params, **KINDS[kind])
    shapes = abstract_quant(sites, plan)
    jax.tree.map(
        lambda a, s: (
            (a.shape, a.dtype) == (s.shape, s.dtype) or pytest.fail(f"{a} {s}")
        ),
        base["quant"],
        shapes,
    )
    mesh = make_mesh(1, 4)
    places = shard_tree(base["quant"], quant_axes(sites, plan), mesh)
    spread = jax.device_put(base["quant"], places)
    split = [not x.sharding.is_fully_replicated for x in jax.tree.leaves(spread)]
    assert any(split) or kind == "nf4-across-rows"
    params_places = shard_tree(base["params"], without(params_axes(model), plan), mesh)
    many = {"params": jax.device_put(base["params"], params_places), "quant": spread}
    lora = small_lora(model, live=True)[1]
    one, four = (
        loss_and_grads(m, b, lora)
        for m, b in ((model, base), (Decoder(SPEC, mesh=mesh), many))
    )
    np.testing.assert_allclose(one[0], four[0], rtol=1e-5)


def test_generation_is_that_of_the_dense_weights() -> None:
    model, params = small_model()
    lora = small_lora(model, live=True)[1]
    base = quantized(model, params, **KINDS["nf4"])
    dense = {"params": dequantize(base["params"], base["quant"])}
    tokens, start = jnp.asarray([[5, 6, 7, 8], [1, 2, 3, 4]]), jnp.zeros(2, jnp.int32)

    def logits(variables: Any) -> Any:
        cache = init_cache(SPEC, 2, 8, jnp.float32)
        weights = split_layers(variables, jnp.float32)
        slot = jnp.zeros((), jnp.int32)
        return cached_logits(SPEC, weights, tokens, slot, start, cache)[0]

    found, wanted = (logits({**b, "lora": lora}) for b in (base, dense))
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    texts = [
        Generator(SPEC, {**b, "lora": lora}).generate([[5, 6, 7]], 12)
        for b in (base, dense)
    ]
    assert texts[0] == texts[1]


def test_a_policy_says_which_weights_are_quantized() -> None:
    sites = find_sites(Decoder(replace(SPEC, tied=False)))
    plan = plan_quant(sites, quant_config())
    assert {path[-1] for path in plan} == {path[-1] for path in sites} - {"lm_head"}
    config = quant_config(targets="mlp.*", pattern="down_proj=int8", group=32)
    plan = plan_quant(sites, config)
    assert {path[-1]: fmt for path, fmt in plan.items()} == {
        "gate_proj": Format("nf4", 32),
        "up_proj": Format("nf4", 32),
        "down_proj": Format("int8", 0),
    }
    assert ("lm_head",) in plan_quant(sites, quant_config(targets="lm_head"))
    assert plan_quant(sites, quant_config(format="none")) == {}


@pytest.mark.parametrize("name", ["ia3", "vera", "prompt", "prefix"])
def test_other_methods_train_and_generate_beside_codes(name: str) -> None:
    """Gradients are those of the dense weights, and so is the cache's answer."""
    model, params = small_model()
    base = quantized(model, params, group=32)
    dense = {"params": dequantize(base["params"], base["quant"])}
    method = plan_method(model, method_config(name))
    trained, frozen = method.start(base, 0)
    trained = jax.tree.map(moved, trained)

    def grads(base: Any) -> Any:
        key, rest = jax.random.key(0), method.rest(base)
        return jax.jit(
            jax.grad(lambda t: nll(model, join(rest, t), small_batch(), key))
        )(trained)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        grads(base),
        grads(dense),
    )
    variables = join(frozen, trained)
    tokens, zero = jnp.asarray([[5, 6, 7, 8]]), jnp.zeros((), jnp.int32)
    row = (tokens, jnp.arange(4)[None], jnp.ones_like(tokens))
    weights = split_layers(variables, jnp.float32)
    cache = init_cache(SPEC, 1, 8, jnp.float32, weights)
    last, _ = cached_logits(SPEC, weights, tokens, zero, jnp.zeros(1, jnp.int32), cache)
    whole = model.apply(variables, *row, method="logits")[:, -1]
    np.testing.assert_allclose(last, whole, atol=2e-5)
