"""Every method: it begins as the base, changes only what it trains, and adds up."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import method_config
from ftjax.errors import UserError
from ftjax.loop import compile_step, on_mesh
from ftjax.methods.method import plan_method
from ftjax.methods.parts import Method
from ftjax.models.cached import cached_logits, init_cache, split_layers
from ftjax.models.decoder import Decoder, hidden_and_head
from ftjax.models.proj import params_axes
from ftjax.objectives.causal import causal
from ftjax.optim import make_optimizer
from ftjax.sharding import batch_sharding, make_mesh, put_batch, shard_tree
from ftjax.step import init_state, make_train_step
from ftjax.weights import join
from tests.models_small import SPEC, micro, nll, optim_config, small_batch, small_model

METHODS: dict[str, dict[str, Any]] = {
    "lora-norms": {"name": "lora", "rank": 4, "also_train": ".*norm"},
    "lora-embedding": {"name": "lora", "rank": 4, "also_train": "embed_tokens"},
    "freeze-last": {"name": "freeze", "layers": 1},
    "freeze-named": {"name": "freeze", "layers": 0, "pattern": "layers.1.mlp.*"},
    "freeze-all-layers": {"name": "freeze", "layers": 2},
    "houlsby": {"name": "bottleneck", "size": 8},
    "ia3": {"name": "ia3"},
    "ia3-norms": {"name": "ia3", "targets": ".*_proj", "also_train": ".*norm"},
    "vera": {"name": "vera", "rank": 8, "targets": "q_proj,o_proj,down_proj"},
    "prompt": {"name": "prompt", "tokens": 3},
    "prefix": {"name": "prefix", "tokens": 3, "std": 1.0},
    "pfeiffer": {"name": "bottleneck", "kind": "pfeiffer", "activation": "relu"},
}

VIRTUAL = ("prompt", "prefix")  # what stands before a row changes it at once


def method(kind: str) -> Method:
    values = METHODS[kind]
    config = method_config(values["name"])
    config.update(values)
    return plan_method(Decoder(SPEC), config)


def logits(variables: Any) -> Any:
    batch = small_batch()
    rows = (batch["tokens"], batch["positions"], batch["segments"])
    return Decoder(SPEC).apply(variables, *rows, method="logits")


def trained_for(kind: str, steps: int = 2) -> tuple[Any, Any, Any]:
    """(what was trained at the start, after some steps, what was frozen)."""
    model, params = small_model()
    trained, frozen = method(kind).start({"params": params}, 0)
    tx = make_optimizer(optim_config(), 10)
    step = jax.jit(make_train_step(causal(model, 8), tx))
    state = init_state(trained, tx, 0)
    for i in range(steps):
        state, metrics = step(state, frozen, micro(small_batch(seed=i), 2))
        assert int(metrics["skipped"]) == 0
    return trained, state.trained, frozen


@pytest.mark.parametrize(
    ("name", "values", "is_base"),
    [
        ("lora", {}, True),
        ("lora", {"init": "loftq"}, True),
        ("lora", {"init": "loftq", "loftq_iters": 2}, False),
        ("lora", {"init": "pissa"}, False),
        ("lora", {"init": "olora"}, False),
        ("lora", {"also_train": ".*norm"}, False),
        ("ia3", {}, True),
        ("prompt", {}, True),
        ("freeze", {}, False),
        ("full", {}, False),
    ],
)
def test_it_says_whether_what_is_frozen_is_the_base(
    name: str, values: dict[str, Any], is_base: bool
) -> None:
    config = method_config(name)
    config.update({"rank": 4, **values} if name == "lora" else values)
    assert plan_method(Decoder(SPEC), config).frozen_is_base == is_base


@pytest.mark.parametrize("kind", [k for k in METHODS if k not in VIRTUAL])
def test_it_begins_as_the_base(kind: str) -> None:
    params = small_model()[1]
    trained, frozen = method(kind).start({"params": params}, 0)
    np.testing.assert_array_equal(
        logits(join(frozen, trained)), logits({"params": params})
    )


@pytest.mark.parametrize("kind", METHODS)
def test_shapes_axes_and_counts_are_those_of_the_arrays(kind: str) -> None:
    plan = method(kind)
    trained, _ = plan.start({"params": small_model()[1]}, 0)
    assert trained.keys() == plan.parts.keys()
    for name, part in plan.parts.items():
        assert jax.tree.map(lambda x: (x.shape, x.dtype), trained[name]) == (
            jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), part.shapes)
        )
        shard_tree(part.shapes, part.axes, make_mesh(1, 4))
    scales = [x for x in jax.tree.leaves(trained) if x.ndim == 1 and x.size == 2]
    count = sum(leaf.size for leaf in jax.tree.leaves(trained))
    lora = plan.parts.get("lora")
    constants = sum(x.size for x in scales) if lora is not None else 0
    assert plan.count == count - constants


@pytest.mark.parametrize("kind", METHODS)
def test_it_learns_and_generates_what_it_learned(kind: str) -> None:
    before, after, frozen = trained_for(kind)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after)
    assert all(any(jax.tree.leaves(part)) for part in moved.values())
    variables = join(frozen, after)
    tokens = jnp.asarray([[5, 6, 7, 8]])
    ones = jnp.ones_like(tokens)
    row = (tokens, jnp.arange(4)[None], ones)
    whole = Decoder(SPEC).apply(variables, *row, method="logits")[:, -1]
    weights = split_layers(variables, jnp.float32)
    cache = init_cache(SPEC, 1, 8, jnp.float32, weights)
    zero = jnp.zeros((), jnp.int32)
    last, _ = cached_logits(SPEC, weights, tokens, zero, jnp.zeros(1, jnp.int32), cache)
    np.testing.assert_allclose(last, whole, atol=2e-5)


@pytest.mark.parametrize(
    "kind", ["freeze-last", "houlsby", "lora-norms", "ia3", "vera", "prompt", "prefix"]
)
def test_four_devices_give_the_numbers_of_one(kind: str) -> None:
    _, one, _ = trained_for(kind)
    model, params = small_model()
    mesh = make_mesh(1, 4)
    params = jax.tree.map(jnp.copy, params)
    placed = jax.device_put(params, shard_tree(params, params_axes(model), mesh))
    plan = method(kind)
    trained, frozen = plan.start({"params": placed}, 0)
    places = {n: shard_tree(p.shapes, p.axes, mesh) for n, p in plan.parts.items()}
    trained = jax.device_put(jax.tree.map(jnp.copy, trained), places)
    tx = make_optimizer(optim_config(), 10)
    state = on_mesh(init_state(trained, tx, 0), mesh)
    step = compile_step(causal(Decoder(SPEC, mesh=mesh), 8), tx, state)
    for i in range(2):
        batch = micro(small_batch(seed=i), 2)
        state, _ = step(
            state, frozen, put_batch(batch, batch_sharding(mesh, leading=1))
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), state.trained, one
    )


def test_a_parted_stack_has_the_gradient_of_the_whole() -> None:
    model, params = small_model()
    batch, key = small_batch(), jax.random.key(0)

    def gradient(kind: str) -> Any:
        trained, frozen = method(kind).start({"params": params}, 0)
        return jax.grad(lambda t: nll(model, join(frozen, t), batch, key))(trained)

    last, both = gradient("freeze-last"), gradient("freeze-all-layers")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[-1:], rtol=1e-4, atol=1e-5),
        last["params"],
        both["params"],
    )


def test_the_reference_is_the_base() -> None:
    """Without what was trained, an adapter's variables are the base's."""
    _, _, frozen = trained_for("houlsby")
    batch = small_batch()
    params = small_model()[1]
    found, wanted = (
        hidden_and_head(Decoder(SPEC), v, batch)[0]
        for v in (frozen, {"params": params})
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"layers": 3}, "not so many layers"),
        ({"layers": 0}, "nothing would be trained"),
        ({"pattern": "mlq"}, "matches no"),
        ({"layers": 0, "pattern": "layers.0.mlp.*"}, "must be its last"),
    ],
)
def test_what_cannot_be_trained_is_refused(values: dict[str, Any], words: str) -> None:
    config = SimpleNamespace(**{"name": "freeze", "layers": 1, "pattern": "", **values})
    with pytest.raises(UserError, match=words):
        plan_method(Decoder(SPEC), config)
