"""Several updates of one base: their sum, one for each row, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.decoding.generator import Generator
from ftjax.errors import UserError
from ftjax.evals.measure import make_sum_batch
from ftjax.methods.lora import merge
from ftjax.methods.several import Update, combine, stack
from ftjax.objectives.causal import causal
from ftjax.sharding import batch_sharding, make_mesh, shard_tree
from ftjax.weights import Delta, choose
from tests.goldens import check_peft
from tests.models_small import SPEC, small_batch, small_model
from tests.quant.test_model import quantized

# Different ranks, layers of different ranks, and sites that one or the other lacks.
SETTINGS: list[dict[str, Any]] = [
    {"rank": 2, "targets": r"q_proj,layers\.0\..*_proj"},
    {"rank": 3, "alpha": 5.0, "targets": "q_proj,o_proj,down_proj"},
    {"rank": 4, "use_rslora": True, "rank_pattern": "v_proj=1"},
]


@pytest.fixture(scope="module")
def updates() -> list[Update]:
    return small_updates(SPEC)


def small_updates(spec: Any) -> list[Update]:
    made = []
    for seed, settings in enumerate(SETTINGS):
        _, plan, lora = check_peft.random_adapter(spec, settings)
        turned = jax.tree.map(
            lambda d, n=seed: d.replace(b=jnp.roll(d.b, n, axis=-1)),
            lora,
            is_leaf=lambda leaf: isinstance(leaf, Delta),
        )
        made.append(Update(turned, plan))
    return made


def dense(params: Any, update: Update | None) -> Any:
    """The base's weights with an update in them."""
    return merge(params, update.lora) if update else params


def test_a_sum_is_the_sum_of_the_updates(updates: list[Update]) -> None:
    _, params = small_model()
    found = combine([updates[0], None, *updates[1:]], [0.7, 9.0, -0.3, 2.0])
    assert found is not None
    wanted = params
    for update, weight in zip(updates, (0.7, -0.3, 2.0), strict=True):
        scaled = jax.tree.map(
            lambda d, w=weight: d.replace(scale=d.scale * np.float32(w)),
            update.lora,
            is_leaf=lambda leaf: isinstance(leaf, Delta),
        )
        wanted = merge(wanted, scaled)
    close(merge(params, found.lora), wanted)
    ranks = {path[-1]: at.ranks for path, at in found.plan.sites.items()}
    assert set(ranks["q_proj"]) == {2 + 3 + 4}
    assert ranks["v_proj"][:2] == (2 + 1, 1)
    assert set(found.plan.sites[("layers", "mlp", "up_proj")].scales) == {1.0}
    assert combine([None], [1.0]) is None


def test_back_to_a_rank(updates: list[Update]) -> None:
    _, params = small_model()
    whole = combine(updates, [1, 1, 1])
    less = combine(updates, [1, 1, 1], 9)
    least = combine(updates, [1, 1, 1], 2)
    assert whole and less and least
    close(dense(params, less), dense(params, whole))
    path = ("layers", "self_attn", "q_proj")
    assert set(least.plan.sites[path].ranks) == {2}
    full, near = (
        np.asarray(u.lora["layers"]["self_attn"]["q_proj"]["w"].dense())[0].reshape(
            SPEC.d_model, -1
        )
        for u in (whole, least)
    )
    left = np.linalg.svd(full, compute_uv=False)[2:]
    missed = np.linalg.norm(full - near)
    np.testing.assert_allclose(missed, np.linalg.norm(left), rtol=1e-4)


@pytest.mark.parametrize("kind", ["float", "nf4"])
def test_each_row_is_what_its_update_gives_alone(
    kind: str, updates: list[Update]
) -> None:
    model, params = small_model()
    base: Any = {"params": params}
    if kind == "nf4":
        base = quantized(model, params, format="nf4", group=32)
    choices = [None, *updates]
    use = [2, 0, 3, 1]
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 30, (4, 20)), jnp.int32)
    rows = (tokens, jnp.broadcast_to(jnp.arange(20), (4, 20)), jnp.ones_like(tokens))
    apply = jax.jit(lambda v, rows: model.apply(v, *rows, method="logits"))
    lora, _ = stack(choices)
    found = apply(choose({**base, "lora": lora}, use), rows)
    for i, k in enumerate(use):
        update = choices[k]
        alone = {**base, "lora": update.lora} if update else base
        np.testing.assert_allclose(found[i], apply(alone, rows)[i], atol=1e-5)
    assert not np.allclose(found[0], apply(base, rows)[0], atol=0.01)


def test_each_prompt_is_what_its_update_gives_alone(updates: list[Update]) -> None:
    _, params = small_model()
    prompts, use = [[5, 6, 7], [5, 6, 7], [9, 4], [5, 6, 7]], [1, 2, 3, 0]
    choices = [None, *updates]
    lora, _ = stack(choices)
    generator = Generator(SPEC, {"params": params, "lora": lora})
    found = generator.generate(prompts, 8, use=use)
    for i, k in enumerate(use):
        update = choices[k]
        alone = Generator(SPEC, {"params": dense(params, update)})
        assert found[i] == alone.generate([prompts[i]], 8)[0]
    assert len({tuple(found[i].tokens) for i in (0, 1, 3)}) > 1
    apart = Generator(SPEC, {"params": params}, apart=True)
    apart.adapt(updates[0].lora)
    assert apart.generate([prompts[0]], 8) == [found[0]]
    apart.adapt(None)
    assert apart.generate([prompts[3]], 8) == [found[3]]


def test_rows_split_over_a_mesh(updates: list[Update]) -> None:
    model, params = small_model()
    lora, axes = stack([None, *updates])
    use = [3, 1, 0, 2]
    batch = {k: jnp.tile(v[:1], (4, 1)) for k, v in small_batch().items()}
    sums = make_sum_batch(causal(model, 8))

    def loss(variables: Any, batch: Any) -> Any:
        return sums(variables, {}, batch)[0].terms["nll"]

    alone = loss(choose({"params": params, "lora": lora}, use), batch)
    mesh = make_mesh(data=2, fsdp=2)
    split = jax.device_put(lora, shard_tree(lora, axes, mesh))
    spread = jax.device_put(batch, batch_sharding(mesh))
    variables = choose({"params": params, "lora": split}, use)
    np.testing.assert_allclose(loss(variables, spread), alone, rtol=1e-6)
    each = [loss(choose({"params": params, "lora": lora}, [k] * 4), batch) for k in use]
    wanted = np.mean(each)
    np.testing.assert_allclose(alone, wanted, rtol=1e-5)


def test_rows_must_choose(updates: list[Update]) -> None:
    lora, _ = stack([*updates])
    with pytest.raises(ValueError, match="have not chosen"):
        Generator(SPEC, {"params": small_model()[1], "lora": lora}).generate([[1]], 2)


def test_more_than_a_product_is_refused(updates: list[Update]) -> None:
    lora = jax.tree.map(
        lambda d: replace(d, m=jnp.ones(3)),
        updates[0].lora,
        is_leaf=lambda leaf: isinstance(leaf, Delta),
    )
    more = [Update(lora, updates[0].plan), updates[1]]
    calls: list[Callable[[], Any]] = [
        lambda: combine(more, [1, 1]),
        lambda: stack(more),
    ]
    for call in calls:
        with pytest.raises(UserError, match="more than a low-rank product") as error:
            call()
        assert "magnitude" in error.value.screen()


def close(found: Any, wanted: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted
    )
