"""What must hold whatever the numbers are: where an objective starts, what is equal."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dpo as dpo_config
from ftjax.data.loader import Loader
from ftjax.methods.method import plan_method
from ftjax.objectives.causal import causal
from ftjax.objectives.distill import TEACHER, distilled
from ftjax.objectives.dpo import dpo, pair_logps
from ftjax.objectives.kto import rated
from ftjax.objectives.orpo import orpo
from ftjax.objectives.reward import reward_model
from ftjax.optim import make_optimizer
from ftjax.reference import put_reference, reference_sums
from ftjax.sharding import (
    make_mesh,
    replicated,
)
from ftjax.step import init_state, make_train_step
from ftjax.weights import join
from tests.models_small import (
    SPEC,
    micro,
    optim_config,
    small_lora,
    small_model,
)
from tests.objectives.made import (
    LENGTH,
    assert_near,
    groups,
    largest,
    loss_config,
    measured,
    policy,
    rows,
)
from tests.quant.test_model import quantized

LN2 = float(np.float32(math.log(2)))


def value(sums: Any, name: str) -> float:
    return float(sums.metrics()[name])


def test_a_reward_model_starts_at_ln_2() -> None:
    model, trained, frozen = policy()
    score = {**trained, "score": {"w": jnp.zeros(SPEC.d_model)}}
    made = reward_model(model, loss_config("reward"))
    data = groups("p" * 8, margin=np.zeros(8))
    loss, sums, grads = measured(made, score, frozen, rows(data, ends=True))
    assert loss == LN2
    assert (value(sums, "accuracy"), value(sums, "accuracy_fair")) == (0, 0.5)
    assert value(sums, "max_reward") == value(sums, "min_reward") == 0
    # Only the head moves at first: through zeros nothing reaches the model.
    assert largest(grads["score"]) > 0 and largest(grads["lora"]) == 0


def test_kto_starts_at_one_half() -> None:
    model, _, frozen = policy()
    start = {"lora": small_lora(model)[1]}
    numbers: dict[str, Any] = {"rated": np.ones(8), "label": np.arange(8) % 2}
    data = groups("p" * 8, **numbers)
    loss, sums, _ = measured(
        rated(model, loss_config("kto")), start, frozen, rows(data)
    )
    assert loss == 0.5 and value(sums, "kl") == 0


def test_a_model_that_is_its_own_teacher_learns_nothing() -> None:
    model, trained, frozen = policy()
    teacher = {**frozen, TEACHER: join(frozen, trained)}
    made = distilled(model, model, loss_config("distill", divergence="reverse_kl"))
    loss, _, grads = measured(made, trained, teacher, rows(groups("aaat")))
    assert abs(loss) < 1e-6 and largest(grads) < 1e-6


@pytest.mark.parametrize("kinds", ["aaaaa", "ttttt"])
def test_orpo_of_answers_or_texts_alone_is_imitation(kinds: str) -> None:
    model, trained, frozen = policy()
    batch = rows(groups(kinds))
    ours = measured(orpo(model, loss_config("orpo")), trained, frozen, batch)
    plain = measured(causal(model, 8), trained, frozen, batch)
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    assert_near(ours[2], plain[2], atol=1e-5)


def test_pairs_whose_numbers_are_known_are_those_of_the_step() -> None:
    """The reference in the step, or computed before from the same weights."""
    model, trained, frozen = policy()
    config = loss_config("dpo", ld_alpha=0.5)
    made, data = dpo(model, config), groups("p" * 8)
    here = measured(made, trained, frozen, rows(data))
    loader = Loader(data, length=LENGTH, packing=True, seed=0, shuffle=True)
    say = partial(pair_logps, model)
    mesh = make_mesh()
    base = jax.device_put(frozen, replicated(mesh))
    known = reference_sums(say, base, loader, config, mesh, 4)
    put_reference(loader, known)
    batch = rows(data)
    assert batch["ref_chosen"].shape == batch["pair"].shape
    before = measured(made, trained, frozen, batch)
    assert before[0] == pytest.approx(here[0], rel=1e-6)
    assert_near(before[2], here[2], atol=1e-5)


METHODS = ("lora", "qlora", "full", "bottleneck", "ia3")


@pytest.mark.parametrize("method", METHODS)
def test_dpo_starts_at_ln_2_and_holds_one_model(method: str) -> None:
    model, params = small_model()
    config = dpo_config.get_config(f"method={method}").method
    if "rank" in config:
        config.rank = 4
    plan = plan_method(model, config)
    base: Any = {"params": params}
    if method == "qlora":
        base = quantized(model, params, format="nf4", group=32)
    trained, frozen = plan.start(base, 0)
    made, data = dpo(model, loss_config("dpo")), groups("p" * 8)
    if not plan.frozen_is_base:
        loader = Loader(data, length=LENGTH, packing=True, seed=0, shuffle=False)
        mesh, say = make_mesh(), partial(pair_logps, model)
        placed = jax.device_put(base, replicated(mesh))
        put_reference(
            loader, reference_sums(say, placed, loader, loss_config("dpo"), mesh, 4)
        )
    tx = make_optimizer(optim_config(), 10)
    state = init_state(trained, tx, 0)
    batch = micro(rows(data), 1)
    given = (state, frozen, batch)
    step = jax.jit(make_train_step(made, tx)).lower(*given).compile()
    after, found = step(*given)
    # Two passes over the same weights, which the compiler may round differently.
    assert float(found["loss"]) == pytest.approx(LN2, rel=1e-6)
    assert float(found["rewards/accuracies"]) == 0
    assert float(found["rewards/accuracies_fair"]) == 0.5
    assert abs(float(found["rewards/margins"])) < 1e-5
    assert int(after.skipped) == 0 and float(found["grad_norm"]) > 0
    memory: Any = step.memory_analysis()
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(given))
    assert memory.argument_size_in_bytes <= whole + 1024
    own = {id(leaf) for leaf in jax.tree.leaves(base)}
    assert {id(leaf) for leaf in jax.tree.leaves(frozen)} <= own
    _, later = step(after, frozen, batch)
    assert float(later["loss"]) < float(found["loss"])


def test_recomputing_changes_no_number() -> None:
    model, trained, frozen = policy()
    lean = small_model(remat="full")[0]
    batch = rows(groups("p" * 8))
    found = [
        measured(dpo(which, loss_config("dpo")), trained, frozen, batch)
        for which in (model, lean)
    ]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert_near(found[0][2], found[1][2], atol=1e-4)
