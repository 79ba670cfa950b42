"""Each optimizer on four devices: its numbers, its shardings, its bytes, its guard."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.loop import compile_step, on_mesh
from ftjax.losses.sums import Sums
from ftjax.memory import estimate
from ftjax.methods.lora import lora_axes
from ftjax.methods.method import plan_method
from ftjax.models.decoder import Decoder
from ftjax.models.proj import params_axes
from ftjax.optim import make_optimizer
from ftjax.optimizers import adam8
from ftjax.optimizers.settings import NAMES
from ftjax.prepare import Shape
from ftjax.sharding import batch_sharding, make_mesh, put_batch, shard_tree
from ftjax.step import Objective, init_state, make_train_step
from tests.models_small import (
    SPEC,
    lora_config,
    optim_config,
    small_lora,
    small_model,
    split,
)

FLOAT = jnp.dtype(jnp.float32)


@pytest.fixture(autouse=True)
def encode_small_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model's weights have some 3,000 numbers."""
    monkeypatch.setattr(adam8, "SMALLEST", 1024)


def shape_of(model: Decoder, method: str = "full") -> Shape:
    plan = plan_method(model, lora_config(name=method, init="kaiming"))
    return Shape(model, plan, {}, FLOAT, FLOAT)


def spread_over(mesh: Any, method: str) -> tuple[Shape, Any, Any]:
    """(shape, trained, frozen) of the small model on a mesh; arrays are copies."""
    model, params = small_model()
    plan, lora = small_lora(model, live=True)
    places = shard_tree(params, params_axes(model), mesh)
    placed = jax.device_put(jax.tree.map(jnp.copy, params), places)
    lora = jax.device_put(lora, shard_tree(lora, lora_axes(plan), mesh))
    shape = shape_of(Decoder(SPEC, mesh=mesh), method)
    return shape, *split(method, {"params": placed}, lora)


def on_each_device(tree: Any) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


OVER = {"bowl": lambda batch: batch["weights"]}


def bowl(variables: Any, frozen: Any, batch: Any, key: Any) -> Sums:
    """A loss with its least at one, quick to compile: only the optimizer is tried."""
    rows = jnp.sum(batch["weights"])
    leaves = jax.tree.leaves(variables)
    loss = sum(jnp.sum(jnp.square(x - 1)) for x in leaves) * rows
    return Sums({"bowl": loss}, {}, {})


@pytest.mark.parametrize("name", NAMES)
def test_four_devices_give_the_numbers_of_one(name: str) -> None:
    config = optim_config(name=name, weight_decay=0.01, lr=0.1)
    mesh = make_mesh(2, 2)
    shape, spread, _ = spread_over(mesh, "full")
    trained = jax.tree.map(lambda x: jnp.asarray(np.array(x)), spread)
    tx, objective = make_optimizer(config, 10, shape.matrices), Objective(bowl, OVER)
    alone = init_state(trained, tx, 0)
    one = jax.jit(make_train_step(objective, tx))
    state = on_mesh(init_state(spread, tx, 0), mesh)
    places = jax.tree.map(lambda x: x.sharding, state)
    many = compile_step(objective, tx, state)
    sharding = batch_sharding(mesh, leading=1)
    batch = {"weights": np.ones((1, 4), np.float32)}
    for _ in range(3):
        alone, expected = one(alone, {}, batch)
        state, found = many(state, {}, put_batch(batch, sharding))
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
    assert places == jax.tree.map(lambda x: x.sharding, state)
    before = jax.tree.map(np.array, (state.trained, state.opt_state))
    batch["weights"][:] = 0
    state, found = many(state, {}, put_batch(batch, sharding))
    assert int(found["skipped"]) == 1
    jax.tree.map(
        np.testing.assert_array_equal, before, (state.trained, state.opt_state)
    )


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_of_a_state_is_exact(name: str, method: str) -> None:
    """On one axis and on two; moments are split as their weights are."""
    config = SimpleNamespace(
        optim=optim_config(name=name),
        train=SimpleNamespace(batch_size=8, accumulate=1),
        model=SimpleNamespace(remat="none"),
        method=SimpleNamespace(name=method, rank=4),
        loss=SimpleNamespace(chunk=8),
    )
    for axes in ((4, 1), (1, 4)):
        mesh = make_mesh(*axes)
        shape, trained, _ = spread_over(mesh, method)
        tx = make_optimizer(config.optim, 1, shape.matrices)
        state = on_mesh(init_state(trained, tx, 0), mesh)
        sizes = estimate(config, shape, 24, mesh)
        assert sizes["optimizer"] == on_each_device(state.opt_state)
