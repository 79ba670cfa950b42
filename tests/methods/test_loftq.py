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
from ftjax.loading import load_base, open_base
from ftjax.methods.loftq import begin_loftq
from ftjax.methods.lora import init_lora, merge, plan_lora
from ftjax.methods.quant import dequantize
from ftjax.methods.residual import nearest
from ftjax.models.decoder import Decoder
from ftjax.models.proj import find_sites
from ftjax.prepare import load_variables, prepare_shape
from ftjax.quant.formats import make_format
from ftjax.quant.qtensor import quantize
from ftjax.sharding import make_mesh
from tests.goldens import make_loftq
from tests.goldens.weights import quant_cases, random_tensor
from tests.models_small import lora_config, small_batch, small_model
from tests.quant.test_model import quantized
from tests.tiny import make_tiny_checkpoint

GOLDEN = json.loads(make_loftq.OUT.read_text())


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_start_is_pefts_whatever_the_scale(scale: float) -> None:
    weight_OI = quant_cases()["plain"]
    fmt = make_format("nf4", group=64, scheme="symmetric", double=False)
    outputs, inputs = weight_OI.shape
    codes = quantize(weight_OI, (inputs,), (outputs,), fmt)
    dense_IO = np.asarray(codes.dense())
    a, b = nearest(weight_OI.T - dense_IO, make_loftq.RANK, scale)
    update_OI = (scale * a @ b).T
    rows = make_loftq.ROWS
    np.testing.assert_allclose(update_OI[:rows], GOLDEN["update"], atol=2e-6)
    x = random_tensor("loftq.x", (rows, inputs))
    np.testing.assert_allclose(x @ (dense_IO + scale * a @ b), GOLDEN["y"], atol=2e-5)
    left = np.linalg.norm(weight_OI - dense_IO.T - update_OI)
    assert left == pytest.approx(GOLDEN["left"], rel=1e-5)


def fitted(params: Any, base: Any, **changes: Any) -> tuple[Any, Any]:
    """(collection at LoftQ's start, the one that it came from)."""
    plan = plan_lora(find_sites(small_model()[0]), lora_config(**changes))
    flat = flatten_dict(base["quant"])
    begun = begin_loftq(plan, {path[:-1]: q.format for path, q in flat.items()}, {}, 1)
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

    def distance(init: str) -> Any:
        config = settings(folder)
        config.method.init = init
        shape = prepare_shape(config, base, mesh)
        trained, frozen, origin = load_variables(config, base, shape, mesh)
        assert origin is None and shape.method.frozen_is_base
        logits = shape.model.apply({**frozen, **trained}, *rows, method="logits")
        return np.abs(np.asarray(logits - floats)).mean(), frozen

    whole = load_base(base, jnp.float32, mesh)
    floats = Decoder(base.spec).apply(whole, *rows, method="logits")
    (near, frozen), (far, codes) = distance("loftq"), distance("kaiming")
    assert near < 0.9 * far
    # The codes are those of any other run: a checkpoint of this one finds them again.
    jax.tree.map(np.testing.assert_array_equal, frozen, codes)


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
