"""PiSSA and OLoRA: the policy begins as its base, and PEFT's numbers follow."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sft
from ftjax.checkpoints.hf import load_params, open_weights
from ftjax.config import validate
from ftjax.errors import UserError
from ftjax.loading import load_base, open_base
from ftjax.losses.causal_lm import causal_lm
from ftjax.methods.lora import merge
from ftjax.methods.method import plan_method
from ftjax.methods.quant import dequantize
from ftjax.methods.residual import beyond, unmoved
from ftjax.models.decoder import Decoder, hidden_and_head
from ftjax.models.registry import spec_from_config
from ftjax.policy import open_policy
from ftjax.prepare import load_variables, prepare_shape
from ftjax.quant.qtensor import quantize
from ftjax.sharding import make_mesh
from ftjax.switch import with_adapter
from tests.goldens import check_peft, make_residual
from tests.models_small import lora_config
from tests.runs import make_run

GOLDEN = json.loads(make_residual.OUT.read_text())["cases"]
KINDS = ("pissa", "olora")
IDS = np.asarray([check_peft.IDS], np.int32)


def rows_of(ids: np.ndarray) -> list[jax.Array]:
    """Tokens, positions and segments."""
    return [jnp.asarray(ids), jnp.arange(ids.shape[1])[None], jnp.ones(ids.shape, int)]


def settings(model: Path, method: str = "lora", **values: Any) -> Any:
    config = sft.get_config(f"model={model},method={method}")
    config.data.train = "rows.jsonl"
    config.model.dtype = "float32"
    config.method.update({"rank": 6, "alpha": 15.0, **values})
    return config


def loaded(config: Any) -> Any:
    """(base, trained, frozen, origin) at the start of a run."""
    base, mesh = open_base(config.model.path), make_mesh()
    shape = prepare_shape(config, base, mesh)
    assert not shape.method.frozen_is_base
    return base, *load_variables(config, base, shape, mesh)


def leaf(tree: Any, name: str) -> np.ndarray:
    """A module's weights as matrices [L, I, O]."""
    for key in ("layers", *name.split("."), "w"):
        tree = tree[key]
    rows = tree.shape[1] * tree.shape[2] if name.endswith("o_proj") else tree.shape[1]
    return np.asarray(tree).reshape(len(tree), rows, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_begins_as_its_base(kind: str, tiny_llama: Path) -> None:
    config = settings(tiny_llama, init=kind, use_rslora=True)
    config.method.rank_pattern = r"layers\.0\.self_attn\.q_proj=2"
    base, trained, frozen, origin = loaded(config)
    whole = load_base(base, jnp.float32, make_mesh())["params"]
    again = merge(frozen["params"], trained["lora"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-7), again, whole)
    assert unmoved(trained["lora"], origin)
    left, w = leaf(frozen["params"], "mlp.up_proj"), leaf(whole, "mlp.up_proj")
    values_of = np.linalg.svd(w[0], compute_uv=False)
    if kind == "pissa":  # the largest that is left is number r + 1
        found = np.linalg.norm(left[0], 2)
        assert found == pytest.approx(values_of[6], rel=1e-5)
    else:  # of the first r columns of W [O, I] all is taken, `scale` times
        rest = (1 - 15 / math.sqrt(6)) * w[0, :6]
        np.testing.assert_allclose(left[0, :6], rest, atol=2e-6)
    assert np.abs(left - w).max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_over_a_quantized_base_the_residual_is_what_is_quantized(
    kind: str, tiny_llama: Path
) -> None:
    config = settings(tiny_llama, "qlora", init=kind)
    config.quant.update({"group": 32, "double_quant": False})
    base, trained, frozen, origin = loaded(config)
    w = leaf(load_base(base, jnp.float32, make_mesh())["params"], "mlp.gate_proj")
    start = origin.lora["layers"]["mlp"]["gate_proj"]["w"]
    left = w.astype(np.float64) - 2.5 * (
        start.a.astype(np.float64) @ start.b.astype(np.float64)
    )
    codes = frozen["quant"]["layers"]["mlp"]["gate_proj"]["w"]
    for layer, w_IO in enumerate(left.astype(np.float32)):
        own = quantize(w_IO.T, codes.inputs, codes.outputs, codes.format)
        np.testing.assert_array_equal(own.codes, codes.codes[layer])
        np.testing.assert_array_equal(own.scale, codes.scale[layer])
    if kind == "pissa":  # its residual is smaller, and so is what rounding takes of it
        policy = merge(dequantize(frozen["params"], frozen["quant"]), trained["lora"])
        plain = quantize(w[0].T, codes.inputs, codes.outputs, codes.format).dense()
        error = np.linalg.norm(leaf(policy, "mlp.gate_proj")[0] - w[0])
        assert error < 0.97 * np.linalg.norm(np.asarray(plain) - w[0])


@pytest.mark.parametrize("case", GOLDEN)
def test_start_gradient_step_and_conversion_are_pefts(
    case: str, tmp_path: Path
) -> None:
    golden, kind = GOLDEN[case], case.split("_")[0]
    folder = check_peft.write_base(tmp_path / "base")
    spec = spec_from_config(check_peft.BASE, "config.json")
    weights, model = open_weights(folder, spec), Decoder(spec)
    own = golden["settings"]
    config = lora_config(
        name="lora",
        init=kind,
        rank=own["r"],
        alpha=float(own["lora_alpha"]),
        use_rslora=own.get("use_rslora", False),
        targets=",".join(make_residual.TARGETS),
    )
    method = plan_method(model, config)
    assert method.begin is not None and method.lora is not None
    begun = method.begin({}, {})
    frozen = load_params(weights, dtype="float32", changes=begun.changes)
    origin = begun.update
    lora = jax.tree.map(jnp.asarray, origin.lora)

    @jax.jit
    def apply(params: Any, lora: Any) -> Any:
        found = model.apply(
            {"params": params, "lora": lora}, *rows_of(IDS), method="logits"
        )
        return found[0]

    shown = make_residual.ROWS
    start = apply(frozen, lora)[:shown]
    np.testing.assert_allclose(start, golden["start"], atol=1e-4)
    batch = {
        "tokens": IDS[:, :-1],
        "targets": IDS[:, 1:],
        "positions": np.arange(IDS.shape[1] - 1)[None],
        "segments": np.ones_like(IDS[:, 1:]),
        "weights": np.ones(IDS[:, 1:].shape, np.float32),
    }

    @jax.jit
    @jax.value_and_grad
    def loss(lora: Any) -> Any:
        variables = {"params": frozen, "lora": lora}
        rows: Any = batch
        sums = causal_lm(*hidden_and_head(model, variables, rows), rows, 8)
        return sums.terms["nll"] / batch["weights"].sum()

    value, grads = loss(lora)
    assert float(value) == pytest.approx(golden["loss"], rel=1e-5)
    for name in make_residual.SHOWN:
        _, _, layer, *path = name.split(".")
        at, short = int(layer), ".".join(path)
        delta, grad = (t["layers"][path[0]][path[1]]["w"] for t in (lora, grads))
        a, b, da, db = (
            np.asarray(x[at]).reshape(*shape)
            for d in (delta, grad)
            for x, shape in ((d.a, (-1, own["r"])), (d.b, (own["r"], -1)))
        )
        wanted = golden[name]
        left = leaf(frozen, short)[at].T[:shown]
        np.testing.assert_allclose(left, wanted["residual"], atol=2e-6)
        np.testing.assert_allclose((da @ b).T[:shown], wanted["b_da"], atol=2e-4)
        np.testing.assert_allclose((a @ db).T[:shown], wanted["db_a"], atol=2e-4)
    stepped = jax.tree.map(lambda x, g: x - make_residual.RATE * g, lora, grads)
    np.testing.assert_allclose(
        apply(frozen, stepped)[-shown:], golden["stepped"], atol=5e-4
    )
    learned = beyond(stepped, method.lora, origin)
    whole = load_params(weights, dtype="float32")
    for params, update in ((whole, learned.lora), (merge(frozen, stepped), {})):
        found = apply(params, update)[-shown:]
        np.testing.assert_allclose(found, golden["stepped"], atol=5e-4)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_is_opened_over_what_was_left(
    method: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Its residual again, and its adapter folder is one of the whole base."""
    run = make_run(tmp_path / "run", tiny_llama, method=method, init="pissa", rank=6)
    policy = open_policy(workdir=str(run))
    config = settings(tiny_llama, method, init="pissa", rank=6, alpha=32.0)
    _, _, frozen, origin = loaded(config)
    kept = {name: policy.variables[name] for name in frozen}
    jax.tree.map(np.testing.assert_array_equal, kept, frozen)
    assert policy.origin is not None and origin is not None
    jax.tree.map(np.testing.assert_array_equal, policy.origin.lora, origin.lora)
    with pytest.raises(UserError, match="belongs to the model"):
        with_adapter(policy, "none")


def test_what_cannot_be_taken_apart_is_refused(tiny_llama: Path) -> None:
    for key, value, match in (
        ("dropout", 0.1, "dropout would drop"),
        ("loftq_iters", 2, "not asked for"),
        ("use_dora", True, "taken apart"),
    ):
        config = settings(tiny_llama, init="pissa")
        config.method[key] = value
        with pytest.raises(UserError, match=match):
            validate(config)
    scratch = settings(tiny_llama, init="olora")
    scratch.model.from_scratch = True
    with pytest.raises(UserError, match="no weights to begin with"):
        validate(scratch)
    base = open_base(str(tiny_llama))
    formats = prepare_shape(settings(tiny_llama, "qlora"), base).formats
    weights = SimpleNamespace(formats=formats)
    stored = SimpleNamespace(spec=base.spec, weights=weights, name="codes")
    with pytest.raises(
        UserError, match="stored quantized cannot be taken apart"
    ) as error:
        prepare_shape(settings(tiny_llama, init="pissa"), stored)  # type: ignore[arg-type]
    assert "nf4" in error.value.screen()
