"""The prompt of a pair once for both answers: the same numbers, on fewer tokens."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import cpo, dpo, kto, orpo, reward, sft
from ftjax.data.dataset import Dataset
from ftjax.data.encode import Example
from ftjax.data.groups import VALUES, shared_prompt
from ftjax.data.loader import Loader, group_slots, row_length
from ftjax.data.report import DataReport
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.objectives.tasks import check_sharing, task_of
from tests.models_small import SPEC, small_lora, small_params

CONFIGS = {"dpo": dpo, "kto": kto, "cpo": cpo, "orpo": orpo}


def answer(prompt: Any, rng: Any, where: str) -> Example:
    ids = np.concatenate([prompt, rng.integers(0, SPEC.vocab_size, rng.integers(1, 6))])
    trained = np.arange(len(ids)) >= len(prompt)
    return Example(ids.astype(np.int32), trained, where)


def pairs(reads: str, shared: bool) -> Dataset:
    """Pairs with prompts of 1 to 20 tokens; of one the sides differ in the prompt."""
    rng = np.random.default_rng(0)
    groups, examples = list[tuple[int, ...]](), list[Example]()
    for length in (12, 1, 20, 2, 7):
        prompt = rng.integers(0, SPEC.vocab_size, length)
        other = prompt.copy()
        other[-1] += length == 7
        groups.append((len(examples), len(examples) + 1))
        examples += [answer(p, rng, f"d:{length}") for p in (prompt, other)]
    values = {name: np.ones(len(groups), np.float32) for name in VALUES[reads]}
    if reads == "rated":
        values["label"] = np.array([1, 0, 1, 1, 0], np.float32)
    if reads == "mixed":
        # A text beside the pairs: a group of one.
        groups.append((len(examples),))
        examples.append(answer(prompt[:1], rng, "d:text"))
        kinds = {"pair": [1] * 5 + [0], "answer": [0] * 6, "text": [0] * 5 + [1]}
        values = {k: np.array(v, np.float32) for k, v in kinds.items()}
    report = DataReport("d", "train", 64)
    return Dataset(examples, report, groups=groups, values=values, members=2,
                   shared=shared)  # fmt: skip


def batch_of(data: Dataset) -> Any:
    length = row_length(data, max_length=64, packing=True)
    load = Loader(data, length=length, packing=True, seed=0, shuffle=False)
    return load.batch(0, load.rows_per_epoch)


def test_the_prompt_stands_once_and_its_last_token_before_each_answer() -> None:
    data = pairs("pairs", True)
    [row] = Loader(data, length=64, packing=False, seed=0, shuffle=False).batch(0, 1)[
        "tokens"
    ]
    batch = Loader(data, length=64, packing=False, seed=0, shuffle=False).batch(0, 1)
    one, other = data.examples[:2]
    n, m = len(one.ids) - 12, len(other.ids) - 12
    assert row[:11].tolist() == one.ids[:11].tolist()
    assert row[11 : 11 + n].tolist() == one.ids[11:-1].tolist()
    assert row[11 + n : 11 + n + m].tolist() == other.ids[11:-1].tolist()
    expected = [1] * 11 + [2] * n + [3] * m
    assert batch["segments"][0, : 11 + n + m].tolist() == expected
    assert batch["parents"][0, : 11 + n + m].tolist() == [0] * 11 + [1] * (n + m)
    places = [*range(11), *range(11, 11 + n), *range(11, 11 + m)]
    assert batch["positions"][0, : 11 + n + m].tolist() == places
    trained = batch["targets"][0][batch["weights"][0] > 0]
    assert trained.tolist() == [*one.ids[12:], *other.ids[12:]]
    saved = (group_slots(pairs("pairs", False)) - group_slots(data)).tolist()
    assert saved == [11, 0, 19, 1, 5]


def test_what_both_begin_with_ends_before_either_answer() -> None:
    ids = np.arange(9, dtype=np.int32)
    one, other = (Example(ids, np.arange(9) >= k, "d:1") for k in (4, 6))
    assert shared_prompt((one, other)) == 4
    assert shared_prompt((one,)) == 0


@pytest.mark.parametrize(
    ("task", "spec"),
    [
        ("dpo", SPEC),
        ("dpo", replace(SPEC, windows=(6, 0))),
        ("kto", SPEC),
        ("orpo", SPEC),
    ],
)
def test_loss_and_gradient_are_those_of_the_plain_rows(task: str, spec: Any) -> None:
    config = CONFIGS[task].get_config()
    if task == "orpo":
        config.loss.nll_scope = "chosen"
    model, base = Decoder(spec), {"params": small_params()}
    objective = task_of(task).make(model, config.loss)
    lora = small_lora(model, live=True)[1]

    @jax.jit
    def found(lora: Any, batch: Any) -> Any:
        def total(lora: Any) -> Any:
            sums = objective.loss({**base, "lora": lora}, base, batch, None)
            return sum(sums.terms.values()), (sums, objective.totals(batch))

        return jax.value_and_grad(total, has_aux=True)(lora)

    shared, plain = (
        found(lora, batch_of(pairs(task_of(task).reads, s))) for s in (True, False)
    )
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(plain[1])) > 1e-2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        shared,
        plain,
    )


def config_of(task: Any, **changes: Any) -> ConfigDict:
    config = task.get_config()
    config.data.share_prompt = True
    config.update_from_flattened_dict(changes)
    return config


def test_only_where_no_prompt_is_trained_on() -> None:
    for allowed in (dpo, cpo, kto):
        check_sharing(config_of(allowed))
    check_sharing(config_of(orpo, **{"loss.nll_scope": "chosen"}))
    refused = [
        (config_of(orpo), "prompt+chosen"),
        (config_of(reward), "task=reward"),
        (config_of(sft), "task=sft"),
        (config_of(dpo, **{"data.completion_only": False}), "completion_only"),
    ]
    for config, part in refused:
        with pytest.raises(UserError) as caught:
            check_sharing(config)
        assert part in str(caught.value.got)
