"""LoRA as PEFT defines it: start, scale, targets, patterns, merging, counts."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.checkpoints.peft import is_zero
from ftjax.errors import UserError
from ftjax.methods.lora import init_lora, merge, plan_lora
from ftjax.models.decoder import hidden_and_head
from ftjax.models.proj import Site, find_sites
from tests.models_small import lora_config, small_batch, small_lora, small_model

Q = ("layers", "self_attn", "q_proj")


def hidden_of(model: Any, variables: Any) -> Any:
    return hidden_and_head(model, variables, small_batch())[0]


def hidden(model: Any, variables: Any) -> np.ndarray:
    return np.asarray(hidden_of(model, variables))


def test_the_model_begins_as_its_base() -> None:
    model, params = small_model()
    _, lora = small_lora(model)
    base = hidden(model, {"params": params})
    np.testing.assert_array_equal(hidden(model, {"params": params, "lora": lora}), base)


def test_merged_equals_unmerged() -> None:
    model, params = small_model()
    _, lora = small_lora(
        model, live=True, rank_pattern="layers.0.self_attn.q_proj=2,down_proj=8"
    )
    base = hidden(model, {"params": params})
    tuned = hidden(model, {"params": params, "lora": lora})
    assert np.abs(tuned - base).max() > 1e-3
    merged = hidden(model, {"params": merge(params, lora)})
    np.testing.assert_allclose(merged, tuned, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"rank": 4, "alpha": 8.0}, 2.0),
        ({"rank": 16, "alpha": 8.0}, 0.5),
        ({"rank": 16, "alpha": 8.0, "use_rslora": True}, 2.0),
    ],
)
def test_scale(changes: dict[str, Any], scale: float) -> None:
    model, _ = small_model()
    plan, lora = small_lora(model, **changes)
    assert plan.sites[Q].scales == (scale, scale)
    np.testing.assert_array_equal(
        lora["layers"]["self_attn"]["q_proj"]["w"].scale, [scale, scale]
    )


def test_start_is_uniform_within_one_over_root_of_the_inputs() -> None:
    model, _ = small_model()
    _, lora = small_lora(model, rank=16)
    delta = lora["layers"]["mlp"]["down_proj"]["w"]
    bound = 1 / math.sqrt(48)
    a = np.asarray(delta.a)
    assert np.abs(a).max() <= bound and np.abs(a).max() > 0.98 * bound
    assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not np.asarray(delta.b).any()
    assert not np.array_equal(a[0], a[1])


def test_gaussian_start_has_deviation_one_over_rank() -> None:
    model, _ = small_model()
    plan, _ = small_lora(model, rank=8)
    a = np.asarray(init_lora(plan, 0, "gaussian")["layers"]["mlp"]["down_proj"]["w"].a)
    assert a.std() == pytest.approx(1 / 8, rel=0.1)


def test_the_other_start_has_a_zero_a_and_learns_by_it() -> None:
    model, params = small_model()
    plan, _ = small_lora(model, rank=9, rank_pattern="layers.0.mlp.down_proj=4")
    lora = init_lora(plan, 0, "a_zero")
    delta = lora["layers"]["mlp"]["down_proj"]["w"]
    b = np.abs(np.asarray(delta.b))
    assert not np.asarray(delta.a).any() and not b[0, 4:].any()
    for layer, bound in enumerate((1 / math.sqrt(4), 1 / math.sqrt(9))):
        assert 0.98 * bound < b[layer].max() <= bound

    def loss(lora: Any) -> Any:
        return jnp.sum(jnp.square(hidden_of(model, {"params": params, "lora": lora})))

    np.testing.assert_array_equal(
        hidden(model, {"params": params, "lora": lora}),
        hidden(model, {"params": params}),
    )
    grad = jax.grad(loss)(lora)["layers"]["mlp"]["down_proj"]["w"]
    assert np.asarray(grad.a).any() and not np.asarray(grad.b).any()
    assert is_zero(lora)


def test_a_site_starts_alike_whatever_else_is_trained() -> None:
    model, _ = small_model()
    every = small_lora(model)[1]["layers"]["self_attn"]["q_proj"]["w"].a
    alone = small_lora(model, targets="q_proj")[1]["layers"]["self_attn"]["q_proj"][
        "w"
    ].a
    np.testing.assert_array_equal(every, alone)


def test_targets_may_differ_by_layer_and_padding_stays_zero() -> None:
    model, params = small_model()
    plan, lora = small_lora(
        model, targets=r"layers\.1\..*q_proj,v_proj", rank_pattern="layers.0.*v_proj=2"
    )
    assert plan.sites[Q].ranks == (0, 4)
    assert plan.sites[("layers", "self_attn", "v_proj")].ranks == (2, 4)
    assert set(plan.sites) == {Q, ("layers", "self_attn", "v_proj")}

    def loss(lora: Any) -> Any:
        found, _ = hidden_and_head(
            model, {"params": params, "lora": lora}, small_batch()
        )
        return (found**2).sum()

    grads = jax.grad(loss)(lora)["layers"]["self_attn"]
    assert not np.asarray(grads["q_proj"]["w"].b[0]).any()
    assert np.asarray(grads["q_proj"]["w"].b[1]).any()
    assert not np.asarray(grads["v_proj"]["w"].b[0, 2:]).any()
    assert not np.asarray(grads["v_proj"]["w"].scale).any()


def test_count_of_a_512_square_weight_at_rank_4() -> None:
    site = Site(("p",), "BTD,DF->BTF", (512, 512), ("embed", "mlp"), None)
    plan = plan_lora({("p",): site}, lora_config(rank=4))
    count = plan.sites[("p",)].count
    assert count == 512 * 4 + 4 * 512 == 4096
    assert round(100 * count / (512 * 512), 2) == 1.56


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": "q_projj"}, "q_projj (0 matches)"),
        ({"targets": "q_proj,up_pro"}, "up_pro (0 matches)"),
        ({"targets": "q_proj("}, "q_proj("),
        ({"targets": "norm"}, "norm (0 matches)"),
        ({"targets": "embed_tokens"}, "embed_tokens (0 matches)"),
        ({"targets": ","}, "','"),
        ({"rank_pattern": "qproj=2"}, "qproj (0 matches)"),
        ({"rank_pattern": "q_proj"}, "q_proj"),
        ({"rank_pattern": "q_proj=0"}, "q_proj=0"),
        ({"alpha_pattern": "q_proj=x"}, "q_proj=x"),
        ({"rank": 33}, "33"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    model, _ = small_model()
    with pytest.raises(UserError) as caught:
        plan_lora(find_sites(model), lora_config(**changes))
    assert words in (caught.value.got or "")
