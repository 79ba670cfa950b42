"""Rollouts: what reaches a batch, and that rollout and training see the same model."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax.config import total_steps
from ftjax.models.cached import cached_logits, init_cache, split_layers
from ftjax.objectives.tasks import task_of
from ftjax.step import init_state, mean_loss, sum_micro_batches
from ftjax.weights import join
from tests.losses.test_rl import plain_gae
from tests.rl.small import config_of, open_small, write_prompts

WARM = 0.7


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("rl") / "prompts.jsonl")


def moved(trained: Any) -> Any:
    """The update of a LoRA as if it had learned something."""
    rng = np.random.default_rng(0)

    def move(leaf: Any) -> Any:
        noise = 0.05 * rng.standard_normal(leaf.shape)
        return leaf + jnp.asarray(noise, jnp.float32)

    return jax.tree.map(move, trained)


@pytest.fixture(scope="module")
def grpo(tiny_llama: Path, prompts: Path) -> Any:
    """A rollout of two batches, twice over, and what it was made with."""
    config = config_of(
        "grpo",
        tiny_llama,
        prompts,
        loss__temperature=WARM,
        loss__beta=0.1,
        rollout__batches=2,
        rollout__passes=2,
        train__accumulate=2,
    )
    game, trained, frozen = open_small(config)
    trained = moved(trained)
    return config, game, trained, frozen, game.rollout(0, trained)


def test_an_epoch_goes_on_to_the_end_of_its_last_rollout(
    tiny_llama: Path, prompts: Path
) -> None:
    config = config_of("ppo", tiny_llama, prompts, rollout__passes=4)
    size = config.train.batch_size
    config.train.update({"steps": None, "epochs": 1.0})
    assert total_steps(config, 9 * size) == 12
    assert total_steps(config, 8 * size) == 8
    assert total_steps(config, 1) == 4


def full_logps(game: Any, variables: Any, rows: Any) -> np.ndarray:
    """log p of each target from whole logits, [n, T]."""
    given = (rows["tokens"], rows["positions"], rows["segments"])
    logits = game.ready.shape.model.apply(
        variables, *map(jnp.asarray, given), method="logits"
    )
    logp = np.asarray(jax.nn.log_softmax(logits / WARM), np.float64)
    return np.take_along_axis(logp, rows["targets"][..., None], 2)[..., 0]


def test_advantages_are_those_of_the_rewards(grpo: Any) -> None:
    rows = grpo[-1]
    assert len(rows["tokens"]) == 16
    groups = rows["metric/reward"].reshape(4, 4).astype(np.float64)
    away = groups - groups.mean(1, keepdims=True)
    expected = away / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    found = rows["advantage"].max(1) + rows["advantage"].min(1)
    np.testing.assert_allclose(found, expected.reshape(-1), atol=1e-5)
    np.testing.assert_allclose(
        rows["metric/reward_std"].reshape(4, 4),
        groups.std(1, ddof=1)[:, None] + 0 * groups,
        rtol=1e-5,
    )
    # Every place of an answer has it, and no other.
    assert np.all((rows["advantage"] != 0) <= (rows["weights"] > 0))
    lengths = rows["weights"].sum(1)
    np.testing.assert_array_equal(lengths, rows["metric/completions/mean_length"])


def test_an_answer_is_behind_its_prompt(grpo: Any) -> None:
    _, game, _, _, rows = grpo
    data = game.ready.data.train
    drawn = [i for (i,) in game.ready.data.loader.groups(0, 4)]
    assert len(set(drawn)) == 4
    for row in range(16):
        ids = data.examples[drawn[row // 4]].ids
        assert rows["tokens"][row, : len(ids)].tolist() == ids.tolist()
        first = int(rows["weights"][row].argmax())
        assert first == len(ids) - 1
        places = np.flatnonzero(rows["weights"][row])
        assert places.tolist() == list(range(first, first + len(places)))
        np.testing.assert_array_equal(
            rows["targets"][row, places], rows["tokens"][row, places + 1]
        )


def test_steps_train_on_every_answer_once_per_pass(grpo: Any) -> None:
    _, game, trained, _, rows = grpo
    state = init_state(trained, optax.set_to_zero(), 0)
    seen = []
    for step in range(4):
        batch = game.batch(step, state)
        assert batch["tokens"].shape[:2] == (2, 4)
        seen.append(batch["old_logp"].reshape(8, -1).sum(1))
    whole = np.sort(rows["old_logp"].sum(1))
    for one, two in (seen[:2], seen[2:]):
        np.testing.assert_array_equal(np.sort(np.concatenate([one, two])), whole)
    assert not np.array_equal(seen[0], seen[2])


def test_rollout_training_and_sampler_agree(grpo: Any) -> None:
    """log p of what was sampled: of the loss, of whole logits, of the decode loop."""
    _, game, trained, frozen, rows = grpo
    policy, weights = join(frozen, trained), rows["weights"]
    naive = full_logps(game, policy, rows) * weights
    np.testing.assert_allclose(rows["old_logp"], naive, atol=1e-4)
    reference = full_logps(game, frozen, rows) * weights
    np.testing.assert_allclose(rows["ref_logp"], reference, atol=1e-4)
    assert np.abs(naive - reference).max() > 0.01

    spec = game.ready.base.spec
    split = split_layers(policy, jnp.float32)
    step = jax.jit(partial(cached_logits, spec))
    n, length = rows["tokens"].shape
    cache = init_cache(spec, n, length, jnp.float32)
    start, found = jnp.zeros(n, jnp.int32), np.zeros((n, length))
    for t in range(int((weights.sum(0) > 0).nonzero()[0].max()) + 1):
        tokens = jnp.asarray(rows["tokens"][:, t : t + 1])
        logits, cache = step(split, tokens, jnp.asarray(t, jnp.int32), start, cache)
        logp = np.asarray(jax.nn.log_softmax(logits / WARM))
        found[:, t] = logp[np.arange(n), rows["targets"][:, t]]
    np.testing.assert_allclose(found * weights, naive, atol=1e-4)


def test_a_rollout_follows_from_its_number_and_the_policy(grpo: Any) -> None:
    _, game, trained, _, rows = grpo
    again, other = game.rollout(0, trained), game.rollout(1, trained)
    for name, value in rows.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    assert not np.array_equal(other["tokens"], rows["tokens"])


def averages(mask: np.ndarray) -> dict[str, np.ndarray]:
    """The weight of each token of 8 answers in two micro-batches, [8, T]."""
    halves = np.repeat(mask.reshape(2, -1).sum(1), 4)[:, None]
    return {
        "dapo": mask / mask.sum(),
        "grpo": mask / mask.sum(1, keepdims=True) / 8,
        "bnpo": mask / halves / 2,
        "dr_grpo": mask / (8 * 8),
    }


def test_a_grpo_step_is_its_formula(grpo: Any) -> None:
    """Loss and gradient of two micro-batches, off the policy that sampled."""
    config, game, trained, frozen, _ = grpo
    later = jax.tree.map(lambda x: x * 1.5, trained)
    state = init_state(trained, optax.set_to_zero(), 0)
    model = game.ready.shape.model
    objective = task_of("grpo").make(model, config.loss)
    update = jax.jit(partial(sum_micro_batches, objective))

    @jax.jit
    @jax.value_and_grad
    def naive(trained: Any, flat: Any, average: Any) -> Any:
        given = (flat[name] for name in ("tokens", "positions", "segments"))
        logits = model.apply(join(frozen, trained), *given, method="logits")
        logp = jax.nn.log_softmax(logits / WARM)
        at = jnp.take_along_axis(logp, flat["targets"][..., None], 2)[..., 0]
        a, mask = flat["advantage"], flat["weights"]
        rho = jnp.exp((at - flat["old_logp"]) * mask)
        back = (flat["ref_logp"] - at) * mask
        gain = -jnp.minimum(rho * a, jnp.clip(rho, 0.8, 1.2) * a)
        return jnp.sum((gain + 0.1 * (jnp.exp(back) - back - 1)) * average)

    for kind in ("dapo", "grpo", "bnpo", "dr_grpo"):
        with config.unlocked():
            config.loss.type = kind
        batch = game.batch(0, state)
        totals = objective.totals(batch)
        sums, grads = update(totals, later, frozen, batch, jax.random.key(0))
        flat = {n: jnp.asarray(x.reshape(8, *x.shape[2:])) for n, x in batch.items()}
        average = averages(np.asarray(flat["weights"], np.float64))[kind]
        value, expected = naive(later, flat, jnp.asarray(average, jnp.float32))
        found = float(mean_loss(sums, totals))
        assert found == pytest.approx(float(value), abs=1e-5), kind
        scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
        near = partial(np.testing.assert_allclose, atol=1e-4 * scale, err_msg=kind)
        jax.tree.map(near, grads, expected)
    said = sums.metrics()
    rewards = np.asarray(flat["metric/reward"])
    assert float(said["reward"]) == pytest.approx(rewards.mean(), rel=1e-5)
    assert float(said["kl"]) > 0 and float(said["entropy"]) > 0


def test_ppo_learns_values_and_pays_for_the_kl(tiny_llama: Path, prompts: Path) -> None:
    config = config_of("ppo", tiny_llama, prompts, loss__beta=0.2)
    game, trained, frozen = open_small(config)
    trained = moved(trained)
    rows = game.rollout(0, trained)
    mask = rows["weights"] > 0
    kl = (rows["old_logp"] - rows["ref_logp"]).astype(np.float64)
    assert np.abs(kl).max() > 0.01 and np.abs(rows["old_value"]).max() > 0.01
    advantage = np.zeros(mask.shape)
    for row in range(8):
        at = np.flatnonzero(mask[row])
        earned = -0.2 * kl[row, at]
        earned[-1] += rows["metric/reward"][row]
        values = rows["old_value"][row, at].astype(np.float64)
        advantage[row, at] = plain_gae(earned, values, 1.0, 0.95)
    goal = np.where(mask, advantage + rows["old_value"], 0)
    np.testing.assert_allclose(rows["return"], goal, atol=1e-5)
    kept = advantage[mask]
    white = (advantage - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(rows["advantage"][mask], white[mask], atol=1e-4)
    np.testing.assert_allclose(
        rows["metric/objective/kl"], (kl * mask).sum(1), atol=1e-5
    )

    state = init_state(trained, optax.set_to_zero(), 0)
    batch = game.batch(0, state)
    objective = task_of("ppo").make(game.ready.shape.model, config.loss)
    totals = objective.totals(batch)
    later = {**trained, "value": jax.tree.map(lambda x: x + 0.02, trained["value"])}
    one = jax.tree.map(lambda x: x[0], batch)
    sums = jax.jit(objective.loss)(join(frozen, later), frozen, one)
    score = game._score(join(frozen, later), one)
    value = np.asarray(score["value"], np.float64)
    near = np.clip(value, one["old_value"] - 0.2, one["old_value"] + 0.2)
    error = np.maximum((value - one["return"]) ** 2, (near - one["return"]) ** 2) / 2
    count = one["weights"].sum()
    expected = (
        -one["advantage"].sum() / count + 0.1 * error[one["weights"] > 0].sum() / count
    )
    assert float(mean_loss(sums, totals)) == pytest.approx(expected, abs=1e-5)
    assert float(sums.metrics()["value_loss"]) == pytest.approx(
        error[one["weights"] > 0].mean(), rel=1e-4
    )
