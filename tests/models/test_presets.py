"""Presets carry the published parameter counts, by shape alone."""

import math

import jax
import pytest

from ftjax.models.decoder import Decoder
from ftjax.models.names import count_params, model_weights, tensor_names
from ftjax.models.presets import PRESETS
from ftjax.models.proj import abstract_params

COUNTS = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_1b": 1_235_814_400,
    "llama3_3b": 3_212_749_824,
    "tinyllama_1b": 1_100_048_384,
    "mistral_7b": 7_241_732_096,
    "qwen2_0_5b": 494_032_768,
    "qwen2_1_5b": 1_543_714_304,
    "qwen2_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "smollm3_3b": 3_075_098_624,
}


def test_every_preset_is_counted() -> None:
    assert set(COUNTS) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_and_shapes(name: str) -> None:
    spec = PRESETS[name].spec
    assert count_params(spec) == COUNTS[name]
    shapes = abstract_params(Decoder(spec))
    assert (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == COUNTS[name]
    )
    flat = {
        tuple(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    assert flat == {path: w.leaf_shape for path, w in model_weights(spec).items()}


def test_the_name_map() -> None:
    names = tensor_names(PRESETS["qwen2_7b"].spec)
    assert names["embed_tokens", "embedding"] == "model.embed_tokens.weight"
    assert names["lm_head", "w"] == "lm_head.weight"
    assert names["norm", "scale"] == "model.norm.weight"
    layer = "model.layers.{i}."
    assert (
        names["layers", "self_attn", "q_proj", "w"] == layer + "self_attn.q_proj.weight"
    )
    assert (
        names["layers", "self_attn", "k_proj", "b"] == layer + "self_attn.k_proj.bias"
    )
    assert names["layers", "mlp", "down_proj", "w"] == layer + "mlp.down_proj.weight"
    assert ("layers", "self_attn", "o_proj", "b") not in names
    assert ("lm_head", "w") not in tensor_names(PRESETS["qwen2_0_5b"].spec)


def test_settings_that_differ_from_the_defaults() -> None:
    llama = PRESETS["llama3_1b"].spec
    assert (llama.rope.kind, llama.rope.factor, llama.rope.theta) == ("llama3", 32, 5e5)
    assert PRESETS["mistral_7b"].spec.windows == (4096,) * 32
    assert PRESETS["qwen3_0_6b"].spec.head_dim == 128
    assert PRESETS["smollm3_3b"].spec.rope_layers == (True, True, True, False) * 9
