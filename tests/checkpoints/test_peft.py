"""Adapters in PEFT's files: peft's own, ours again, and everything that is wrong."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftjax.checkpoints.hf import load_params, open_weights, save_params
from ftjax.checkpoints.peft import is_zero, load_adapter, save_adapter
from ftjax.errors import UserError
from ftjax.methods.lora import init_lora, merge
from ftjax.models.decoder import Decoder
from ftjax.models.proj import find_sites
from ftjax.models.registry import spec_from_config
from tests.goldens import check_peft
from tests.goldens.weights import write_adapter

GOLDEN = json.loads(check_peft.OUT.read_text())["cases"]
SPEC = spec_from_config(check_peft.BASE, "config.json")
SITES = find_sites(Decoder(SPEC))


def golden_base(name: str, folder: Path) -> tuple[Decoder, Any]:
    """The model that a golden adapter belongs to, and its weights."""
    spec = spec_from_config(check_peft.base_config(name), "config.json")
    base = check_peft.write_base(folder, name)
    return Decoder(spec), load_params(open_weights(base, spec), dtype="float32")


@pytest.mark.parametrize("name", GOLDEN)
def test_what_peft_wrote_means_the_same_here(name: str, tmp_path: Path) -> None:
    model, params = golden_base(name, tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", GOLDEN[name])
    adapter = load_adapter(folder, find_sites(model))
    tokens = jnp.asarray([check_peft.IDS], jnp.int32)
    rows = (tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
    variables = {"params": params, "lora": adapter.lora}
    logits = model.apply(variables, *rows, method="logits")[0]
    wanted = np.array(GOLDEN[name]["logits"], np.float32)
    np.testing.assert_allclose(np.asarray(logits), wanted, atol=1e-4)
    assert adapter.base_hash is None
    assert not is_zero(adapter.lora)


@pytest.mark.parametrize("name", ["dora", "dora_biased"])
def test_dora_has_the_gradient_and_the_merged_weight_of_peft(
    name: str, tmp_path: Path
) -> None:
    model, params = golden_base(name, tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", GOLDEN[name])
    adapter = load_adapter(folder, find_sites(model))
    tokens = jnp.asarray([check_peft.IDS], jnp.int32)
    rows = (tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))

    def loss(lora: Any) -> Any:
        logits = model.apply({"params": params, "lora": lora}, *rows, method="logits")
        logp = jax.nn.log_softmax(logits[0, :-1])
        return -jnp.mean(jnp.take_along_axis(logp, tokens[0, 1:, None], axis=1))

    # A gradient has the shapes of an adapter: it is written, and compared, as one.
    grads = jax.grad(loss)(jax.tree.map(jnp.asarray, adapter.lora))
    save_adapter(tmp_path / "gradient", grads, adapter.plan, "base", None)
    found = load_file(tmp_path / "gradient" / "adapter_model.safetensors")
    wanted = GOLDEN[name]["gradient"]
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert np.abs(value).max() > 1e-4, key
        np.testing.assert_allclose(found[key], value, atol=2e-6, rtol=2e-4, err_msg=key)
    merged = tmp_path / "merged"
    merged.mkdir()
    config = check_peft.base_config(name)
    whole = merge(params, adapter.lora)
    save_params(merged, whole, model.spec, config=config, dtype="float32")
    stored = load_file(merged / "model.safetensors")
    for key, value in GOLDEN[name]["merged"].items():
        np.testing.assert_allclose(stored[key], value, atol=2e-6)


@pytest.mark.parametrize("name", check_peft.OURS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    _, params = golden_base("", tmp_path / "base")
    _, plan, lora = check_peft.random_adapter(SPEC, check_peft.OURS[name], params)
    save_adapter(tmp_path / "adapter", lora, plan, "org/base", "f" * 64)
    back = load_adapter(tmp_path / "adapter", SITES)
    assert back.base_name == "org/base"
    assert back.base_hash == "f" * 64
    for path, at in plan.sites.items():
        assert back.plan.sites[path].ranks == at.ranks
        assert back.plan.sites[path].scales == at.scales
    jax.tree.map(np.testing.assert_array_equal, back.lora, lora)


def test_layers_without_an_update_are_left_out(tmp_path: Path) -> None:
    settings = check_peft.OURS["some_layers"]
    _, plan, lora = check_peft.random_adapter(SPEC, settings)
    save_adapter(tmp_path, lora, plan, "base", None)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert not any("layers.1.self_attn.q_proj" in key for key in keys)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj",
        "o_proj",
    ]


def test_an_adapter_at_its_start_is_zero() -> None:
    _, plan, lora = check_peft.random_adapter(SPEC, {})
    assert is_zero(init_lora(plan, 0))
    assert not is_zero(lora)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"bias": "all"}, "bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"r": 0}, "adapter_config.json: r"),
        ({"r": "four"}, "adapter_config.json: r"),
        ({"lora_alpha": 10**400}, "adapter_config.json: lora_alpha"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "a positive number"),
        ({"target_modules": 5}, "target_modules"),
        ({"layers_to_transform": "x"}, "layers_to_transform"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "target_modules"),
        ({"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, "embed_tokens"),
        ({"rank_pattern": {"q_proj": 3}}, "q_proj.lora_A.weight"),
        ({"rank_pattern": {"(": 3}}, "regular expression"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ],
)
def test_a_config_that_means_something_else_is_refused(
    change: dict[str, Any], part: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path, GOLDEN["plain"])
    config = GOLDEN["plain"]["config"] | change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        load_adapter(folder, SITES)
    assert part in error.value.screen()


def _rename(tensors: dict[str, np.ndarray]) -> None:
    for key in list(tensors):
        tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)


def _drop_half(tensors: dict[str, np.ndarray]) -> None:
    tensors.pop(next(key for key in tensors if "layers.1" in key and "lora_B" in key))


def _drop_module(tensors: dict[str, np.ndarray]) -> None:
    for key in [key for key in tensors if "layers.1.self_attn.q_proj" in key]:
        tensors.pop(key)


def _magnitude(tensors: dict[str, np.ndarray]) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    tensors[key] = np.ones(32, np.float32)


def _head(tensors: dict[str, np.ndarray]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = np.ones((4, 32), np.float32)


def _deeper(tensors: dict[str, np.ndarray]) -> None:
    for half in "AB":
        key = f"base_model.model.model.layers.7.self_attn.q_proj.lora_{half}.weight"
        tensors[key] = np.ones((4, 4), np.float32)


def _transpose(tensors: dict[str, np.ndarray]) -> None:
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key] = np.ascontiguousarray(tensors[key].T)


def _not_a_number(tensors: dict[str, np.ndarray]) -> None:
    next(iter(tensors.values()))[0, 0] = np.nan


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (_rename, "without the prefix base_model.model."),
        (_drop_half, "lora_B.weight"),
        (_drop_module, "no update of model.layers.1.self_attn.q_proj"),
        (_magnitude, "use_dora=false"),
        (_head, "the head"),
        (_deeper, "model.layers.7.self_attn.q_proj"),
        (_transpose, "wrong shape"),
        (_not_a_number, "NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    spoil: Any, part: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path, GOLDEN["plain"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError) as error:
        load_adapter(folder, SITES)
    assert part in error.value.screen()


def test_not_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of an adapter"):
        load_adapter(tmp_path / "gone", SITES)
    (tmp_path / "adapter_config.json").write_text(json.dumps(GOLDEN["plain"]["config"]))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="pickle"):
        load_adapter(tmp_path, SITES)
