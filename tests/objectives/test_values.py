"""Loss and gradient of every objective on packed rows equal its formula in float64."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.data.dataset import Dataset
from ftjax.objectives.cpo import cpo
from ftjax.objectives.distill import TEACHER, distilled
from ftjax.objectives.dpo import dpo
from ftjax.objectives.kto import rated
from ftjax.objectives.orpo import orpo
from ftjax.objectives.reward import reward_model
from ftjax.step import Objective
from tests.models_small import moved
from tests.objectives import alone
from tests.objectives.made import (
    assert_near,
    groups,
    loss_config,
    measured,
    policy,
    rows,
)

MARGINS = np.array([0.3, 0, -1, 2, 0.1, 0, 0, 1])
LABELS = np.array([1, 0, 0, 1, 1, 0, 1, 0])


@dataclass(frozen=True)
class Case:
    """An objective, its data, and the formula that it must equal."""

    objective: Objective
    data: Dataset
    formula: Any
    trained: Any
    frozen: Any
    other: Any = None
    ends: bool = False
    micro: bool = True  # whether micro-batches are one big batch


def case(name: str) -> Case:
    model, trained, frozen = policy()
    pairs = groups("p" * 8)
    if name == "dpo":
        made = dpo(model, loss_config("dpo", beta=0.3))
        return Case(made, pairs, alone.dpo(0.3), trained, frozen)
    if name == "ipo,sft":
        config = loss_config("dpo", type=name, type_weights="1,0.5", ld_alpha=0.5)
        formula = alone.ipo_sft_short(0.1, 0.5, 0.5)
        return Case(dpo(model, config), pairs, formula, trained, frozen)
    if name == "orpo":
        config = loss_config("orpo", beta=0.4, answer_weight=0.5, text_weight=0.25)
        formula = alone.orpo(0.4, 0.5, 0.25)
        return Case(orpo(model, config), groups("patppatap"), formula, trained, frozen)
    if name == "orpo of answers":
        config = loss_config("orpo", nll_scope="chosen")
        formula = alone.orpo(0.1, 1, 1, whole=False)
        return Case(orpo(model, config), groups("ppap"), formula, trained, frozen)
    if name == "reward":
        made = reward_model(model, loss_config("reward", center=0.05))
        data = groups("p" * 8, margin=MARGINS)
        trained = {**trained, "score": {"w": moved(jnp.zeros((1, 32)))[0] * 30}}
        formula = alone.reward(MARGINS, 0.05)
        return Case(made, data, formula, trained, frozen, ends=True)
    if name == "kto":
        config = loss_config("kto", desirable_weight=1.5, beta=2.0)
        data = groups("p" * 8, 3, rated=np.ones(8), label=LABELS)
        formula = alone.kto(2.0, LABELS, 1.5, 1.0)
        made = rated(model, config)
        return Case(made, data, formula, trained, frozen, micro=False)
    if name == "cpo":
        made = cpo(model, loss_config("cpo", nll_weight=0.7))
        return Case(made, pairs, alone.cpo(0.1, 0.7), trained, frozen)
    if name == "simpo":
        made = cpo(model, loss_config("simpo", gamma=0.6))
        return Case(made, pairs, alone.simpo(2.0, 0.6), trained, frozen)
    config = loss_config("distill", nll_weight=0.3, temperature=1.7)
    teacher = jax.tree.map(moved, frozen)
    data, made = groups("aaaaaat"), distilled(model, model, config)
    formula = alone.distill(0.3, 1.7)
    return Case(made, data, formula, trained, {**frozen, TEACHER: teacher}, teacher)


NAMES = (
    "dpo",
    "ipo,sft",
    "orpo",
    "orpo of answers",
    "reward",
    "kto",
    "cpo",
    "simpo",
    "distill",
)


@cache
def batch_of(name: str) -> tuple[Case, Any]:
    """A case and its packed rows."""
    made = case(name)
    batch = rows(made.data, ends=made.ends)
    assert batch["segments"].max() > 2, "the rows are not packed"
    return made, batch


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_in_micro_batches_give_the_loss_of_the_formula(name: str) -> None:
    """Which knows neither of rows nor of micro-batches."""
    made, batch = batch_of(name)
    step = (made.objective, made.trained, made.frozen, batch)
    loss, _, grads = measured(*step, k=2 if made.micro else 1)
    base = {"params": made.frozen["params"]}
    true, true_grads = alone.true_loss(
        made.formula, made.data, made.trained, base, made.other
    )
    assert loss == pytest.approx(true, rel=2e-6)
    assert_near(grads, true_grads, atol=2e-4)


def test_the_divergence_of_kto_is_that_of_a_micro_batch() -> None:
    made, batch = batch_of("kto")
    step = (made.objective, made.trained, made.frozen)
    parts = [only(batch, half) for half in (slice(0, 2), slice(2, 4))]
    found = [measured(*step, part) for part in parts]
    counts = [part["rated"].sum() for part in parts]
    z0 = [float(sums.means["kl"].sum) for _, sums, _ in found]
    assert max(z0) > 0 and z0[0] / counts[0] != z0[1] / counts[1]
    cut, whole = measured(*step, batch, 2)[0], measured(*step, batch)[0]
    mean = np.dot([loss for loss, _, _ in found], counts) / sum(counts)
    assert cut == pytest.approx(mean, rel=1e-6)
    assert abs(cut - whole) > 1e-4 * whole


def only(batch: Any, kept: slice) -> Any:
    """The batch, of whose rows all but some are empty."""
    empty = {name: np.zeros_like(x) for name, x in batch.items()}
    for name, x in batch.items():
        empty[name][kept] = x[kept]
    return empty
