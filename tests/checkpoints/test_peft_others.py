"""(IA)^3, prompts and prefixes in PEFT's files: peft's own numbers, and ours again."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.common import method_config
from ftjax.checkpoints.hf import load_params, open_weights
from ftjax.checkpoints.peft_others import load_any, save_any
from ftjax.checkpoints.peft_saved import with_saved
from ftjax.errors import UserError
from ftjax.methods.freeze import trained_names
from ftjax.methods.lora import merge
from ftjax.methods.method import plan_method
from ftjax.models.decoder import Decoder
from ftjax.models.proj import find_sites, init_params
from ftjax.models.registry import spec_from_config
from ftjax.models.vera import as_lora
from ftjax.weights import join
from tests.goldens import check_peft
from tests.goldens.check_peft_others import OURS, OUT, moved
from tests.goldens.weights import write_adapter

GOLDEN = json.loads(OUT.read_text())["cases"]
SPEC = spec_from_config(check_peft.BASE, "config.json")
SITES = find_sites(Decoder(SPEC))


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_and_gradients_are_those_of_peft(name: str, tmp_path: Path) -> None:
    base = check_peft.write_base(tmp_path / "base")
    params = load_params(open_weights(base, SPEC), dtype="float32")
    adapter = load_any(write_adapter(tmp_path / "adapter", GOLDEN[name]), SITES, SPEC)
    tokens = jnp.asarray([check_peft.IDS], jnp.int32)
    rows = (tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))

    params = with_saved(params, adapter.saved, SPEC, "adapter")

    def loss(variables: Any) -> Any:
        logits = Decoder(SPEC).apply(variables, *rows, method="logits")[0]
        logp = jax.nn.log_softmax(logits[:-1])
        return -jnp.mean(logp[jnp.arange(len(logp)), tokens[0, 1:]]), logits

    variables = {
        "params": params,
        adapter.kind: jax.tree.map(jnp.asarray, adapter.tree),
    }
    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(variables)
    wanted = np.array(GOLDEN[name]["logits"], np.float32)
    np.testing.assert_allclose(np.asarray(logits), wanted, atol=1e-4)
    out, plan, saved = tmp_path / "out", adapter.plan, adapter.saved
    save_any(out, gradient, plan, SITES, "base", None, saved=saved, spec=SPEC)
    found = load_file(out / "adapter_model.safetensors")
    assert found.keys() == GOLDEN[name]["tensors"].keys()
    assert found.keys() >= GOLDEN[name]["gradient"].keys()
    for key, values in GOLDEN[name]["gradient"].items():
        close = 1e-5 + 2e-5 * np.abs(values).max()
        np.testing.assert_allclose(found[key], values, rtol=1e-3, atol=close)


@pytest.mark.parametrize("name", OURS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    config = method_config(OURS[name]["name"])
    config.update(OURS[name])
    base = {"params": jax.jit(partial(init_params, Decoder(SPEC)))(jax.random.key(0))}
    method = plan_method(Decoder(SPEC), config)
    trained, frozen = method.start(base, 0)
    policy = join(frozen, moved(trained))
    base_of, names = ("org/base", "f" * 64), trained_names(method, SPEC)
    save_any(tmp_path, policy, method.lora, SITES, *base_of, saved=names, spec=SPEC)
    back = load_any(tmp_path, SITES, SPEC)
    assert (back.base_name, back.base_hash) == base_of
    assert back.saved.keys() == names
    jax.tree.map(np.testing.assert_array_equal, back.tree, policy[back.kind])
    restored = with_saved(base["params"], back.saved, SPEC, "adapter")
    jax.tree.map(np.testing.assert_array_equal, restored, policy["params"])


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("ia3", {"fan_in_fan_out": True}, "fan_in_fan_out"),
        ("ia3_norm", {"modules_to_save": ["normm"]}, "modules_to_save"),
        ("ia3_norm", {"modules_to_save": None}, "no place for"),
        ("ia3", {"modules_to_save": ["lm_head"]}, "no such tensor"),
        ("prompt", {"modules_to_save": ["model.norm"]}, "modules_to_save"),
        ("lora_tied", {"ensure_weight_tying": False}, "parts the embedding"),
        ("vera", {"bias": "all"}, "bias"),
        ("vera", {"r": 5}, "vera_A"),
        ("vera", {"target_modules": ["q_proj", "o_proj"]}, "target_modules"),
        ("ia3", {"target_modules": ["k_proj"]}, "no place for"),
        ("ia3", {"feedforward_modules": ["k_proj"]}, "does not fit this model"),
        ("ia3", {"feedforward_modules": None}, "feedforward_modules"),
        ("prefix", {"prefix_projection": True}, "prefix_projection"),
        ("prompt", {"num_virtual_tokens": 6}, "[6, 32]"),
    ],
)
def test_what_means_something_else_is_refused(
    name: str, change: dict[str, Any], part: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path, GOLDEN[name])
    config = GOLDEN[name]["config"] | change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        load_any(folder, SITES, SPEC)
    assert part in error.value.screen()


@pytest.mark.parametrize("name", ["vera", "vera_some_layers"])
def test_vera_merged_has_the_logits_of_peft(name: str, tmp_path: Path) -> None:
    base = check_peft.write_base(tmp_path / "base")
    params = load_params(open_weights(base, SPEC), dtype="float32")
    adapter = load_any(write_adapter(tmp_path / "adapter", GOLDEN[name]), SITES, SPEC)
    merged = merge(params, as_lora(adapter.tree))
    tokens = jnp.asarray([check_peft.IDS], jnp.int32)
    rows = (tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
    logits = Decoder(SPEC).apply({"params": merged}, *rows, method="logits")[0]
    wanted = np.array(GOLDEN[name]["logits"], np.float32)
    np.testing.assert_allclose(np.asarray(logits), wanted, atol=1e-4)


def test_vera_without_its_matrices_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, GOLDEN["vera"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop("base_model.vera_A")
    save_file(tensors, file)
    with pytest.raises(UserError) as error:
        load_any(folder, SITES, SPEC)
    assert "save_projection=True" in error.value.screen()


def test_a_missing_vector_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, GOLDEN["ia3"])
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.k_proj.ia3_l"
    tensors.pop(key)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError) as error:
        load_any(folder, SITES, SPEC)
    assert key in error.value.screen()
