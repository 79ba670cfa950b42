"""LoftQ's start: what quantization took, as near as the rank allows; PEFT's numbers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import sft
from ftjax.config import validate
from ftjax.errors import UserError
from ftjax.gradients import project
from ftjax.loading import load_base, open_base
from ftjax.methods.loftq import begin_loftq
from ftjax.methods.lora import LoraPlan, SitePlan, init_lora, merge, plan_lora
from ftjax.methods.quant import dequantize
from ftjax.methods.residual import beyond
from ftjax.models.decoder import Decoder
from ftjax.models.proj import Site, find_sites
from ftjax.policy import open_policy
from ftjax.prepare import load_variables, prepare_shape
from ftjax.quant.formats import make_format
from ftjax.quant.qtensor import quantize
from ftjax.sharding import make_mesh
from tests.goldens import make_loftq
from tests.goldens.weights import quant_cases, random_tensor
from tests.models_small import lora_config, small_batch, small_model
from tests.quant.test_model import quantized
from tests.runs import make_run
from tests.tiny import make_tiny_checkpoint

GOLDEN = json.loads(make_loftq.OUT.read_text())


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("turns", ["one", "turns"])
def test_start_gradient_and_merge_are_pefts_whatever_the_scale(
    turns: str, scale: float
) -> None:
    weight_OI, golden = quant_cases()["plain"], GOLDEN[turns]
    outputs, inputs = weight_OI.shape
    fmt = make_format("nf4", group=64, scheme="symmetric", double=False)
    axes = ("embed", "ffn")
    site = Site(("x",), "BI,IO->BO", (inputs, outputs), axes, None)
    rank, rows = make_loftq.RANK, make_loftq.ROWS
    plan = LoraPlan({("x",): SitePlan(site, (rank,), (scale * rank,))})
    count = {"one": 1, "turns": make_loftq.TURNS}[turns]
    begun = begin_loftq(plan, {("x",): fmt}, {}, count)
    quantized = begun.changes["x",](0, weight_OI)
    codes = quantize(quantized, (inputs,), (outputs,), fmt)
    delta = begun.update.lora["x"]["w"]
    assert begun.moves == (turns == "turns") == np.any(quantized != weight_OI)
    update_OI = np.asarray(delta.dense()).T
    np.testing.assert_allclose(update_OI[:rows], golden["update"], atol=4e-6)
    merged_IO = np.asarray(codes.dense() + delta.dense())
    np.testing.assert_allclose(merged_IO.T[:rows], golden["merged"], atol=4e-6)
    left = np.linalg.norm(weight_OI - merged_IO.T)
    assert left == pytest.approx(golden["left"], rel=1e-5)
    x = jnp.asarray(random_tensor("loftq.x", (rows, inputs)))

    def half_square(delta: Any) -> Any:
        y = project("BI,IO->BO", x, codes) + delta(site.eqn, x)
        return jnp.sum(jnp.square(y)) / 2, y

    (_, y), grad = jax.value_and_grad(half_square, has_aux=True)(delta)
    np.testing.assert_allclose(y, golden["y"], atol=2e-5)
    b_da, db_a = (np.asarray(m).T for m in (grad.a @ delta.b, delta.a @ grad.b))
    # The root of the scale is taken out of each factor: these do not see it.
    np.testing.assert_allclose(b_da[:rows], golden["b_da"], atol=3e-4)
    np.testing.assert_allclose(db_a[:rows], golden["db_a"], atol=3e-4)


def fitted(params: Any, base: Any, **changes: Any) -> tuple[Any, Any]:
    """(collection at LoftQ's start, the one that it came from)."""
    plan = plan_lora(find_sites(small_model()[0]), lora_config(**changes))
    formats = {path[:-1]: q.format for path, q in flat(base["quant"]).items()}
    begun = begin_loftq(plan, formats, {}, 1)
    for path, change in begun.changes.items():
        leaf = params
        for name in (*path, "w"):
            leaf = leaf[name]
        inputs = int(np.prod(plan.sites[path].site.inputs))
        for layer, w in enumerate(leaf):
            w_OI = np.asarray(w).reshape(inputs, -1).T
            np.testing.assert_array_equal(change(layer, w_OI), w_OI)
    lora = init_lora(plan, 0, "loftq")
    return begun.fill(lora), lora


def flat(tree: Any) -> Any:
    return flatten_dict(tree)


FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"group": 32},
    "nf4-double": {"group": 32, "double_quant": True},
    "int4-affine": {"format": "int4", "scheme": "affine", "group": 16},
    "int8": {"format": "int8"},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_at_full_rank_the_policy_begins_as_the_float_base(kind: str) -> None:
    model, params = small_model()
    base = quantized(model, params, **FORMATS[kind])
    targets = {"targets": "q_proj,k_proj", "alpha": 6.0}
    lora, _ = fitted(params, base, rank=16, rank_pattern="q_proj=32", **targets)
    back = merge(dequantize(base["params"], base["quant"]), lora)
    for name in ("q_proj", "k_proj"):
        got, wanted = (t["layers"]["self_attn"][name]["w"] for t in (back, params))
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_the_error_is_less_in_every_layer_and_smaller_ranks_stay_padded() -> None:
    model, params = small_model()
    base = quantized(model, params, group=32, pattern="o_proj=none")
    pattern = "layers.0.self_attn.q_proj=2"
    lora, before = fitted(params, base, rank_pattern=pattern, use_rslora=True)
    plain = dequantize(base["params"], base["quant"])

    def errors(tree: Any) -> Any:
        return jax.tree.map(
            lambda w, x: np.linalg.norm(np.reshape(w - x, (w.shape[0], -1)), axis=1),
            tree["layers"]["self_attn"],
            params["layers"]["self_attn"],
        )

    nearer, start = errors(merge(plain, lora)), errors(plain)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert (nearer[name]["w"] < 0.9 * start[name]["w"]).all()
    # Two of four ranks: the others of layer 0 are zero, and stay so.
    q = lora["layers"]["self_attn"]["q_proj"]["w"]
    assert not np.any(q.a[0, ..., 2:]) and not np.any(q.b[0, 2:])
    # A target that stays floating point begins as ever.
    jax.tree.map(
        np.testing.assert_array_equal,
        lora["layers"]["self_attn"]["o_proj"],
        before["layers"]["self_attn"]["o_proj"],
    )


def settings(model: Path, **values: str) -> Any:
    config = sft.get_config(f"model={model},method=qlora")
    config.data.train = "rows.jsonl"
    config.model.dtype = "float32"
    config.method.update({"rank": 8, "init": "loftq"})
    config.quant.update({"group": 32, "double_quant": False, **values})
    return config


def test_a_run_begins_nearer_to_its_float_base(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    base, mesh = open_base(str(folder)), make_mesh()
    batch = small_batch(4, 12)
    rows = [jnp.asarray(batch[n]) for n in ("tokens", "positions", "segments")]

    def distance(init: str, turns: int = 1, dora: bool = False) -> Any:
        config = settings(folder)
        config.method.update({"init": init, "loftq_iters": turns, "use_dora": dora})
        shape = prepare_shape(config, base, mesh)
        trained, frozen, origin = load_variables(config, base, shape, mesh)
        assert (origin is None) == shape.method.frozen_is_base == (turns == 1)
        logits = shape.model.apply({**frozen, **trained}, *rows, method="logits")
        return np.abs(np.asarray(logits - floats)).mean(), frozen

    whole = load_base(base, jnp.float32, mesh)
    floats = Decoder(base.spec).apply(whole, *rows, method="logits")
    (near, frozen), (far, codes) = distance("loftq"), distance("kaiming")
    assert near < 0.9 * far
    # A magnitude begins as the length of the codes with their update.
    assert distance("loftq", dora=True)[0] == pytest.approx(near, rel=1e-3)
    # The codes are those of any other run: a checkpoint of this one finds them again.
    jax.tree.map(np.testing.assert_array_equal, frozen, codes)
    (nearer, frozen) = distance("loftq", 4)
    assert nearer < 0.97 * near
    path = ("quant", "layers", "mlp", "up_proj", "w")
    assert np.mean(flat(frozen)[path].codes != flat(codes)[path].codes) > 0.01


def test_with_more_turns_a_run_is_opened_over_its_own_codes(
    tiny_llama: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"init": "loftq", "rank": 8}
    config = settings(tiny_llama)
    config.method.loftq_iters = 3
    config.quant.update({"group": -1, "double_quant": True})
    base, mesh = open_base(str(tiny_llama)), make_mesh()
    shape = prepare_shape(config, base, mesh)
    trained, frozen, origin = load_variables(config, base, shape, mesh)
    run = make_run(
        tmp_path / "run", tiny_llama, method="qlora", loftq_iters=3, **values
    )
    policy = open_policy(workdir=str(run))
    kept = {name: policy.variables[name] for name in frozen}
    jax.tree.map(np.testing.assert_array_equal, kept, frozen)
    assert origin is not None and policy.origin is not None
    # Its update over the float base misses what the start has left of the error.
    lora, plan = policy.variables["lora"], policy.plan
    assert plan is not None
    whole = load_base(base, jnp.float32, mesh)["params"]
    learned = merge(whole, beyond(lora, plan, policy.origin).lora)

    def weights(params: Any) -> Any:
        return flat(params)["layers", "mlp", "gate_proj", "w"]

    exact = weights(merge(dequantize(frozen["params"], frozen["quant"]), lora))
    start = merge(dequantize(frozen["params"], frozen["quant"]), trained["lora"])
    missed = weights(whole) - weights(start)
    np.testing.assert_allclose(weights(learned) - exact, missed, atol=1e-6)


def test_without_an_error_it_is_refused_before_anything_is_read() -> None:
    config = settings(Path("gone"), format="none")
    with pytest.raises(UserError, match="there is none") as error:
        validate(config)
    assert "config.method.init" in error.value.screen()


def test_targets_or_bases_without_weights_to_compare_are_refused(
    tmp_path: Path,
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    base = open_base(str(folder))
    config = settings(folder, pattern="q_proj=none")
    config.method.targets = "q_proj"
    with pytest.raises(UserError, match="no quantization error"):
        prepare_shape(config, base)
    shape = prepare_shape(settings(folder), base)
    weights = SimpleNamespace(formats=shape.formats)
    stored = SimpleNamespace(spec=base.spec, weights=weights, name="codes")
    config = settings(folder, format="none")
    with pytest.raises(UserError, match="no quantization error") as error:
        prepare_shape(config, stored)  # type: ignore[arg-type]
    assert "stored quantized" in error.value.screen()
