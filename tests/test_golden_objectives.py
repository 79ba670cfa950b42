"""Three optimizer steps of every objective equal those of torch, from its formula."""

from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from ftjax.data.dataset import Dataset
from ftjax.data.encode import Example
from ftjax.data.groups import MEMBERS, VALUES, mismatched
from ftjax.data.loader import Batch, Loader
from ftjax.data.report import DataReport
from ftjax.loop import micro_batches
from ftjax.objectives.distill import TEACHER
from ftjax.objectives.online import LENGTH, METRIC
from ftjax.objectives.tasks import TASKS, Task
from ftjax.reference import put_reference, reference_sums
from ftjax.rl.advantages import of_groups, of_values, shares
from ftjax.rl.answers import lay_out
from ftjax.rl.rollouts import make_score
from ftjax.sharding import make_mesh, replicated
from tests.golden_steps import Start, check_steps, golden, load, start
from tests.goldens import make_steps, objective_data
from tests.goldens.objective_data import MARGINS, REWARDS, SETTINGS

GOLDEN = golden("objective_steps.json")["tasks"]
PLACES = 48  # of a row
MICRO = 2  # parts of a step
ROWS = 4  # that a reference reads at a time


def example(prompt: list[int], answer: list[int]) -> Example:
    ids = np.array([*prompt, *answer], np.int32)
    return Example(ids, np.arange(len(ids)) >= len(prompt), "golden")


def gathered(task: Task, groups: list[Any], **values: Any) -> Dataset:
    """Groups of examples; every number of a group that is not named is 0."""
    places = iter(range(sum(map(len, groups))))
    known = {name: np.asarray(x, np.float32) for name, x in values.items()}
    zeros = np.zeros(len(groups), np.float32)
    return Dataset(
        [example for group in groups for example in group],
        DataReport("golden", "train", PLACES),
        groups=[tuple(next(places) for _ in group) for group in groups],
        values={name: known.get(name, zeros) for name in VALUES[task.reads]},
        members=MEMBERS[task.reads],
        ends=task.ends,
    )


def data_of(task: Task) -> Dataset:
    """The golden sequences, as the task reads them."""
    if task.reads == "answers":
        rows = make_steps.rows()
        return gathered(task, [(example(ids[:n], ids[n:]),) for ids, n in rows])
    if task.reads == "rated":
        rated = objective_data.rated()
        own = [example(prompt, answer) for prompt, answer, _ in rated]
        groups = list(zip(own, mismatched(own, PLACES), strict=True))
        labels = [good for *_, good in rated]
        return gathered(task, groups, rated=np.ones(len(own)), label=labels)
    pairs = [
        (example(prompt, chosen), example(prompt, rejected))
        for prompt, chosen, rejected in objective_data.pairs()
    ]
    return gathered(task, pairs, pair=np.ones(len(pairs)), margin=MARGINS)


def packed(
    task: Task, begun: Start, config: Any, micro: int, precompute: bool
) -> Batch:
    """The golden sequences in packed rows, enough for `micro` parts of equal size.

    Where it is precomputed, they bring what the reference says of them.
    """
    loader = Loader(data_of(task), length=PLACES, packing=True, seed=0, shuffle=False)
    rows = -(-loader.rows_per_epoch // micro) * micro
    if task.reference and precompute:
        mesh, say = make_mesh(), partial(task.reference, begun.model)
        policy = jax.device_put(begun.policy, replicated(mesh))
        sums = reference_sums(say, policy, loader, config.loss, mesh, ROWS)
        put_reference(loader, sums)
    return next(loader.epoch(rows))


def rolled_out(task: Task, begun: Start, config: Any) -> Batch:
    """The golden answers as the rows of a rollout, one in each."""
    prompts, answers = zip(*objective_data.sampled(), strict=True)
    batch = lay_out(prompts, answers, PLACES)
    found = jax.jit(make_score(begun.model, config.loss))(begun.policy, batch)
    said = {"old_logp": ("old", "logp"), "ref_logp": ("reference", "logp")}
    if task.head:
        said["old_value"] = ("value", "value")
    for leaf, (name, of) in said.items():
        batch[leaf] = np.array(found[of])
        for row, answer in enumerate(answers):
            noise = objective_data.noise(name, row, len(answer))
            batch[leaf][row, batch["weights"][row] > 0] += noise
    judged: Any = SimpleNamespace(judged=SimpleNamespace(total=np.array(REWARDS)))
    batch |= (of_values if task.head else of_groups)(judged, batch, config)[0]
    if not task.head:
        batch |= shares(batch["weights"], config.loss, MICRO, PLACES)
    return batch | {METRIC + LENGTH: batch["weights"].sum(1)}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", GOLDEN)
def test_objectives_equal_torch(name: str, method: str, tmp_path: Path) -> None:
    """In packed rows, or those of a rollout, in two micro-batches.

    KTO's divergence is that of a micro-batch, so there is one. The reference of full
    fine-tuning has spoken before, that of LoRA is in the step.
    """
    task, begun = TASKS[name], start(tmp_path, method, TASKS[name].head)
    micro = 1 if task.reads == "rated" else MICRO
    config = import_module(f"configs.{name}").get_config()
    config.loss.update(chunk=8, **SETTINGS[name])
    if task.online:
        config.rollout.group = objective_data.GROUP
        rows = rolled_out(task, begun, config)
    else:
        rows = packed(task, begun, config, micro, precompute=method == "full")
    batch = micro_batches(rows, micro)
    assert batch["weights"].any((1, 2)).all(), "a micro-batch is empty"
    frozen = begun.frozen
    if task.guided:
        teacher, weights = load(tmp_path, "teacher.")
        frozen = {**frozen, TEACHER: {"params": weights}}
        objective = task.guided(begun.model, teacher, config.loss)
    else:
        objective = task.make(begun.model, config.loss)
    check_steps(begun, frozen, objective, batch, GOLDEN[name][method])


def test_every_task_has_its_golden() -> None:
    assert GOLDEN.keys() | {"sft", "generic"} == TASKS.keys()
