"""A step on four devices, split by a mesh or mapped, gives the numbers of one."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.loop import compile_step, map_step, on_mesh
from ftjax.methods.lora import lora_axes, plan_lora
from ftjax.models.decoder import Decoder
from ftjax.models.proj import find_sites, params_axes
from ftjax.objectives.causal import causal
from ftjax.objectives.dpo import dpo
from ftjax.objectives.orpo import orpo
from ftjax.objectives.reward import reward_model
from ftjax.optim import make_optimizer
from ftjax.sharding import (
    batch_sharding,
    make_mesh,
    put_batch,
    replicated,
    shard_tree,
)
from ftjax.step import Objective, init_state, make_train_step
from tests.models_small import SPEC, lora_config, micro, optim_config
from tests.objectives.made import assert_near, groups, loss_config, policy, rows

STEPS = 2


def objective(name: str, model: Decoder) -> Objective:
    if name == "sft":
        return causal(model, 8)
    made = {"dpo": dpo, "orpo": orpo, "reward": reward_model}[name]
    return made(model, loss_config(name))


def optimizer() -> Any:
    # A large eps: Adam makes a step of a gradient that is nothing but rounding.
    return make_optimizer(optim_config(eps=1e-3), 10)


def trained_of(name: str) -> Any:
    head = {"score": {"w": jnp.ones(SPEC.d_model)}} if name == "reward" else {}
    return jax.tree.map(jnp.copy, {**policy()[1], **head})


def batch_of(name: str) -> Any:
    if name in ("sft", "orpo"):
        return rows(groups("aaaatata" if name == "sft" else "patpappap"))
    return rows(groups("p" * 10, margin=np.zeros(10)), ends=name == "reward")


@cache
def alone(name: str) -> tuple[Any, Any]:
    """(trained, metrics) after some steps on one device."""
    model, _, frozen = policy()
    step = jax.jit(make_train_step(objective(name, model), optimizer()))
    state = init_state(trained_of(name), optimizer(), 0)
    for _ in range(STEPS):
        state, found = step(state, frozen, micro(batch_of(name), 1))
    return state.trained, found


def assert_same(name: str, state: Any, found: Any) -> None:
    trained, expected = alone(name)
    assert found.keys() == expected.keys()
    for key, x in found.items():
        np.testing.assert_allclose(x, expected[key], rtol=1e-4, atol=1e-5, err_msg=key)
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
    assert_near(state.trained, trained, atol=1e-4)


@pytest.mark.parametrize(("name", "axes"), [("dpo", (2, 2)), ("reward", (1, 4))])
def test_over_a_mesh(name: str, axes: tuple[int, int]) -> None:
    mesh, model = make_mesh(*axes), policy()[0]
    plan = plan_lora(find_sites(model), lora_config())
    trained, frozen = trained_of(name), policy()[2]
    places = {
        "lora": shard_tree(trained["lora"], lora_axes(plan), mesh),
        "score": {"w": replicated(mesh)},
    }
    trained = {k: jax.device_put(x, places[k]) for k, x in trained.items()}
    base = {"params": shard_tree(frozen["params"], params_axes(model), mesh)}
    placed = jax.device_put(jax.tree.map(jnp.copy, frozen), base)
    state = on_mesh(init_state(trained, optimizer(), 0), mesh)
    made = objective(name, Decoder(SPEC, mesh=mesh))
    step = compile_step(made, optimizer(), state)
    sent = put_batch(micro(batch_of(name), 1), batch_sharding(mesh, leading=1))
    for _ in range(STEPS):
        state, found = step(state, placed, sent)
    assert_same(name, state, found)


@pytest.mark.parametrize("name", ["sft", "dpo", "orpo"])
def test_mapped(name: str) -> None:
    mesh, frozen = make_mesh(), policy()[2]
    whole = replicated(mesh)
    placed = jax.device_put(jax.tree.map(jnp.copy, frozen), whole)
    trained = jax.device_put(trained_of(name), whole)
    state = on_mesh(init_state(trained, optimizer(), 0), mesh)
    step = map_step(objective(name, policy()[0]), optimizer(), state)
    split = {k: x.reshape(1, 4, -1, *x.shape[1:]) for k, x in batch_of(name).items()}
    sent = put_batch(split, batch_sharding(mesh, leading=1))
    for _ in range(STEPS):
        state, found = step(state, placed, sent)
    assert_same(name, state, found)
    # One copy a device, and no axis of devices: a checkpoint needs nothing undone.
    for leaf in jax.tree.leaves(state):
        assert leaf.is_fully_replicated and len(leaf.sharding.device_set) == 4
