"""The step: exact accumulation, guarded updates, the same numbers on any mesh."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.loop import compile_step, on_mesh
from ftjax.losses.sums import Sums
from ftjax.methods.lora import lora_axes
from ftjax.models.decoder import Decoder, hidden_and_head
from ftjax.models.proj import params_axes
from ftjax.objectives.causal import causal
from ftjax.optim import make_optimizer
from ftjax.sharding import batch_sharding, make_mesh, put_batch, shard_tree
from ftjax.step import Objective, init_state, make_train_step, sum_micro_batches
from tests.models_small import (
    SPEC,
    micro,
    nll,
    optim_config,
    small_batch,
    small_lora,
    small_model,
    split,
)

METHODS = ("lora", "full")


def parts(method: str, model: Decoder, params: Any, **lora: Any) -> Any:
    return split(method, {"params": params}, small_lora(model, **lora)[1])


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_are_one_big_batch_in_float64(method: str) -> None:
    with jax.enable_x64(True):
        model, params = small_model(dtype=jnp.float64)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        trained, frozen = parts(method, model, params, live=True)
        trained = jax.tree.map(lambda x: x.astype(jnp.float64), trained)

        def loss(variables: Any, frozen: Any, batch: Any, key: Any) -> Sums:
            hidden, head = hidden_and_head(model, variables, batch)
            logits = jnp.einsum("BTD,DV->BTV", hidden, head)
            lp = jax.nn.log_softmax(logits)
            at = jnp.take_along_axis(lp, batch["targets"][..., None], axis=-1)[..., 0]
            w = batch["weights"].astype(jnp.float64)
            return Sums({"nll": -jnp.sum(w * at)}, {}, {})

        key = jax.random.key(0)
        objective = Objective(loss, {"nll": lambda batch: batch["weights"]})
        totals = objective.totals(small_batch())

        summed = jax.jit(partial(sum_micro_batches, objective))

        def in_parts(k: int) -> Any:
            return summed(totals, trained, frozen, micro(small_batch(), k), key)

        (sums, grads), weight = in_parts(1), float(totals["nll"])
        for k in (2, 8):
            found, cut = in_parts(k)
            # The sums are kept in float32; their inputs here are exact to 1e-16.
            np.testing.assert_allclose(
                found.terms["nll"], sums.terms["nll"], rtol=0, atol=2e-6 * weight
            )
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6),
                cut,
                grads,
            )


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_of_unequal_tokens_give_the_same_update(method: str) -> None:
    model, params = small_model()
    trained, frozen = parts(method, model, params)
    # A large eps: Adam makes a step of a gradient that is nothing but rounding.
    tx = make_optimizer(optim_config(eps=1e-3), 10)
    step = jax.jit(make_train_step(causal(model, 8), tx))
    results = []
    for k in (1, 4):
        state = init_state(trained, tx, 0)
        for i in range(3):
            state, metrics = step(state, frozen, micro(small_batch(seed=i), k))
        results.append((float(metrics["loss"]), state.trained))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        *(r[1] for r in results),
    )


@pytest.mark.parametrize("axes", [(4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_four_devices_give_the_numbers_of_one(
    method: str, axes: tuple[int, int]
) -> None:
    tx = make_optimizer(optim_config(weight_decay=0.01), 10)
    model, params = small_model()
    trained, frozen = parts(method, model, params, live=True)
    alone = init_state(trained, tx, 0)
    one = jax.jit(make_train_step(causal(model, 8), tx))

    mesh = make_mesh(*axes)
    spread_model = Decoder(SPEC, mesh=mesh)
    # Copies: the step is given its state to keep, and other tests use these weights.
    places = shard_tree(params, params_axes(model), mesh)
    placed = jax.device_put(jax.tree.map(jnp.copy, params), places)
    plan, lora = small_lora(model, live=True)
    lora = jax.device_put(lora, shard_tree(lora, lora_axes(plan), mesh))
    spread, spread_frozen = split(method, {"params": placed}, lora)
    state = on_mesh(init_state(spread, tx, 0), mesh)
    many = compile_step(causal(spread_model, 8), tx, state)
    sharding = batch_sharding(mesh, leading=1)
    for i in range(3):
        batch = micro(small_batch(seed=i), 1)
        alone, one_metrics = one(alone, frozen, batch)
        state, metrics = many(state, spread_frozen, put_batch(batch, sharding))
        assert float(metrics["loss"]) == pytest.approx(
            float(one_metrics["loss"]), rel=1e-5
        )
        assert float(metrics["trained"]) == float(one_metrics["trained"])
    if axes[1] > 1:
        split_leaves = [
            leaf
            for leaf in jax.tree.leaves((state.trained, state.opt_state))
            if not leaf.sharding.is_fully_replicated
        ]
        assert split_leaves, "nothing is split over the fsdp axis"


def test_an_update_that_is_not_finite_is_left_out() -> None:
    model, params = small_model()
    trained, frozen = parts("lora", model, params, live=True)
    tx = make_optimizer(optim_config(), 10)
    step = jax.jit(make_train_step(causal(model, 8), tx))
    state = init_state(trained, tx, 0)
    poisoned = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), frozen)
    bad, metrics = step(state, poisoned, micro(small_batch(), 1))
    assert int(metrics["skipped"]) == 1 and int(bad.step) == 1
    jax.tree.map(np.testing.assert_array_equal, bad.trained, state.trained)
    jax.tree.map(np.testing.assert_array_equal, bad.opt_state, state.opt_state)
    good, metrics = step(bad, frozen, micro(small_batch(), 1))
    assert int(metrics["skipped"]) == 0
    moved = jax.tree.leaves(
        jax.tree.map(
            lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(),
            good.trained,
            bad.trained,
        )
    )
    assert max(moved) > 0


def test_a_batch_without_trained_tokens_changes_nothing() -> None:
    model, params = small_model()
    trained, frozen = parts("lora", model, params, live=True)
    tx = make_optimizer(optim_config(weight_decay=0.1), 10)
    step = jax.jit(make_train_step(causal(model, 8), tx))
    state = init_state(trained, tx, 0)
    batch = small_batch()
    batch["weights"][:] = 0
    after, metrics = step(state, frozen, micro(batch, 1))
    assert int(metrics["skipped"]) == 1 and float(metrics["trained"]) == 0
    jax.tree.map(np.testing.assert_array_equal, after.trained, state.trained)


def test_dropout_depends_on_seed_and_step_and_spares_evaluation() -> None:
    model, params = small_model()
    trained, frozen = parts("lora", model, params, live=True, dropout=0.5)
    batch = small_batch()
    variables = {**frozen, **trained}
    a, b = (float(nll(model, variables, batch, jax.random.key(s))) for s in (0, 1))
    assert a != b
    assert a == float(nll(model, variables, batch, jax.random.key(0)))
    still = hidden_and_head(model, variables, batch)[0]
    plain = {**frozen, **parts("lora", model, params, live=True)[0]}
    np.testing.assert_array_equal(still, hidden_and_head(model, plain, batch)[0])


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputing_changes_no_number(remat: str) -> None:
    model, params = small_model()
    lean, _ = small_model(remat=remat)
    trained, frozen = parts("lora", model, params, live=True)
    batch = small_batch()

    def grads(which: Decoder) -> Any:
        key = jax.random.key(0)
        return jax.grad(lambda t: nll(which, {**frozen, **t}, batch, key))(trained)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        grads(lean),
        grads(model),
    )
