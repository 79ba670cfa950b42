"""Every key of a config.json that changes the maths is honoured, or refused by name."""

import math
from typing import Any

import pytest

from ftjax.errors import UserError
from ftjax.models.registry import FAMILIES, spec_from_config, token_ids
from ftjax.models.spec import ModelSpec, Rope

BASE = {
    "vocab_size": 32,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}


def read(model_type: str = "llama", **keys: Any) -> ModelSpec:
    return spec_from_config({"model_type": model_type} | BASE | keys, "m/config.json")


def refused(model_type: str = "llama", **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(model_type, **keys)
    assert caught.value.code == 2
    return caught.value.screen()


def test_defaults_are_those_of_each_model_type() -> None:
    specs = {name: read(name) for name in FAMILIES}
    assert specs["llama"] == ModelSpec(
        "llama", 32, 256, 4, 32, 32, 8, 48, norm_eps=1e-6, max_positions=2048
    )
    assert specs["mistral"].n_kv_heads == 8
    assert specs["smollm3"].n_kv_heads == 4
    assert specs["qwen3"].head_dim == 128 and specs["qwen3"].qk_norm
    assert {n for n, s in specs.items() if s.tied} == {"smollm3"}
    assert {n: s.max_positions for n, s in specs.items()} == {
        "llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768,
        "smollm3": 32768,
    }  # fmt: skip
    assert {n: s.rope.theta for n, s in specs.items() if s.rope.theta != 1e4} == {
        "smollm3": 2e6
    }
    assert specs["mistral"].windows == (4096,) * 4
    assert not any(s.windows for n, s in specs.items() if n != "mistral")
    assert specs["smollm3"].rope_layers == (True, True, True, False)


@pytest.mark.parametrize(
    ("model_type", "keys", "field", "value"),
    [
        ("llama", {"head_dim": 12}, "head_dim", 12),
        ("llama", {"head_dim": None}, "head_dim", 8),
        ("llama", {"num_key_value_heads": 2}, "n_kv_heads", 2),
        ("mistral", {"num_key_value_heads": None}, "n_kv_heads", 32),
        ("llama", {"rms_norm_eps": 1}, "norm_eps", 1.0),
        ("llama", {"tie_word_embeddings": True}, "tied", True),
        ("smollm3", {"tie_word_embeddings": False}, "tied", False),
        ("llama", {"attention_bias": True}, "qkv_bias", True),
        ("llama", {"attention_bias": True}, "o_bias", True),
        ("llama", {"mlp_bias": True}, "mlp_bias", True),
        ("qwen2", {}, "qkv_bias", True),
        ("qwen2", {"attention_bias": False}, "qkv_bias", True),
        ("qwen2", {}, "o_bias", False),
        ("qwen3", {"attention_bias": True}, "o_bias", True),
        ("mistral", {"sliding_window": None}, "windows", ()),
        ("mistral", {"sliding_window": 9}, "windows", (9, 9, 9, 9)),
        ("qwen2", {"sliding_window": 9}, "windows", ()),
        (
            "qwen2",
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3},
            "windows",
            (0, 0, 0, 9),
        ),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True}, "windows", ()),
        (
            "qwen3",
            {
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            "windows",
            (0, 9, 0, 9),
        ),
        ("llama", {"layer_types": ["full_attention"] * 4}, "windows", ()),
        (
            "smollm3",
            {"sliding_window": 9, "use_sliding_window": True},
            "windows",
            (0, 0, 0, 9),
        ),
        ("smollm3", {"no_rope_layer_interval": 2}, "rope_layers", (True, False) * 2),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 1, 0]}, "rope_layers",
         (False, True, True, True)),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "rope_layers", ()),
        ("llama", {"max_position_embeddings": 99}, "max_positions", 99),
        ("llama", {"hidden_act": "swish"}, "mlp_bias", False),
    ],
)  # fmt: skip
def test_honoured(
    model_type: str, keys: dict[str, Any], field: str, value: Any
) -> None:
    assert getattr(read(model_type, **keys), field) == value


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3_ROPE = Rope(500.0, "llama3", 8.0, 1.0, 4.0, 16)


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({}, Rope()),
        ({"rope_theta": 5}, Rope(5.0)),
        ({"rope_theta": 5.0, "rope_scaling": None}, Rope(5.0)),
        ({"rope_scaling": {}}, Rope()),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7}}, Rope(7.0)),
        ({"rope_theta": 5, "rope_parameters": {"rope_theta": 7}}, Rope(7.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope(1e4, "linear", 2.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 3}},
         Rope(3.0, "linear", 2.0)),
        ({"rope_theta": 500, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
         LLAMA3_ROPE),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500, **LLAMA3}},
         LLAMA3_ROPE),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}},
         Rope(1e4, "yarn", 4.0, original_max_positions=2048,
              attention_factor=0.1 * math.log(4.0) + 1)),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.5,
                           "beta_fast": 16, "beta_slow": 2, "truncate": False,
                           "original_max_position_embeddings": 8}},
         Rope(1e4, "yarn", 4.0, original_max_positions=8, beta_fast=16.0,
              beta_slow=2.0, truncate=False, attention_factor=1.5)),
        ({"original_max_position_embeddings": 32,
          "rope_scaling": {"type": "yarn", "factor": None,
                           "original_max_position_embeddings": 8}},
         Rope(1e4, "yarn", 64.0, original_max_positions=32,
              attention_factor=0.1 * math.log(64.0) + 1)),
    ],
)  # fmt: skip
def test_rotary_settings(keys: dict[str, Any], rope: Rope) -> None:
    assert read(**keys).rope == rope


@pytest.mark.parametrize(
    ("model_type", "keys", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "silu"]),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2}},
         ["rope_scaling.type", "'dynamic'", "default, linear, llama3, yarn"]),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}},
         ["rope_parameters.rope_type", "'longrope'"]),
        ("llama", {"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}},
         ["rope_scaling.factor", "'2'"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2, "odd": 1}},
         ["rope_scaling.odd"]),
        ("llama", {"rope_scaling": {"type": "default", "mrope_section": [1]}},
         ["rope_scaling.mrope_section"]),
        ("llama", {"rope_scaling": "linear"}, ["rope_scaling", "'linear'"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2},
                   "rope_parameters": {"rope_type": "default"}},
         ["rope_scaling or rope_parameters, not both"]),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1}}},
         ["rope_parameters.full_attention"]),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}},
         ["partial_rotary_factor", "0.5"]),
        ("llama", {"rope_theta": "1e4"}, ["rope_theta", "'1e4'"]),
        ("llama", {"rope_theta": 0}, ["rope_theta"]),
        ("llama", {"sliding_window": 9}, ["sliding_window", "9"]),
        ("llama", {"layer_types": ["sliding_attention"] * 4}, ["layer_types"]),
        ("qwen2", {"layer_types": ["full_attention"]}, ["layer_types", "4 layers"]),
        ("qwen2", {"layer_types": ["linear_attention"] * 4}, ["layer_types"]),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, ["layer_types"]),
        ("mistral", {"layer_types": ["full_attention"] * 4}, ["layer_types"]),
        ("mistral", {"attention_bias": True}, ["attention_bias", "True"]),
        ("qwen2", {"mlp_bias": True}, ["mlp_bias"]),
        ("llama", {"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "'yes'"]),
        ("llama", {"num_key_value_heads": 3}, ["num_key_value_heads", "divisor of 32"]),
        ("llama", {"head_dim": 7}, ["head_dim", "even"]),
        ("llama", {"hidden_size": 33}, ["hidden_size", "num_attention_heads", "33"]),
        ("llama", {"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
        ("llama", {"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
        ("llama", {"vocab_size": 10**30}, ["vocab_size"]),
        ("llama", {"vocab_size": -1}, ["vocab_size", "-1"]),
        ("llama", {"hidden_size": None, "vocab_size": None},
         ["lacks vocab_size, hidden_size"]),
        ("llama", {"rms_norm_eps": float("inf")}, ["rms_norm_eps"]),
        ("smollm3", {"no_rope_layers": [1]}, ["no_rope_layers"]),
        ("smollm3", {"no_rope_layers": [1, 2, 1, 1]}, ["no_rope_layers"]),
        ("llama", {"no_rope_layers": [1, 0, 1, 1]}, ["no_rope_layers"]),
        ("qwen3", {"num_experts": 8}, ["num_experts", "8"]),
        ("llama", {"logit_scale": 0.5}, ["logit_scale", "0.5"]),
        ("llama", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ("llama", {"quantization_config": {"quant_method": "gptq"}},
         ["quantization_config", "gptq", "before its quantization"]),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]},
         ["LlamaForSequenceClassification", "LlamaForCausalLM"]),
    ],
)  # fmt: skip
def test_refused_by_name(
    model_type: str, keys: dict[str, Any], words: list[str]
) -> None:
    screen = refused(model_type, **keys)
    assert "m/config.json" in screen
    for word in words:
        assert word in screen


@pytest.mark.parametrize("model_type", ["gpt2", None, 7, ["llama"], "Llama"])
def test_an_unknown_architecture_lists_what_is_supported(model_type: Any) -> None:
    config = BASE | {"model_type": model_type, "architectures": ["GPT2LMHeadModel"]}
    with pytest.raises(UserError) as caught:
        spec_from_config(config | {"auto_map": {}}, "config.json")
    screen = caught.value.screen()
    for name in FAMILIES:
        assert name in screen
    assert "GPT2LMHeadModel" in screen


def test_architecture_stands_in_for_a_missing_model_type() -> None:
    config = BASE | {"architectures": ["Qwen3ForCausalLM"]}
    assert spec_from_config(config, "config.json").family == "qwen3"


def test_code_of_an_unsupported_model_is_never_run() -> None:
    config = BASE | {"model_type": "odd", "auto_map": {"AutoModel": "modeling_x.X"}}
    with pytest.raises(UserError, match="architecture") as caught:
        spec_from_config(config, "config.json")
    assert "never run" in caught.value.screen()


def test_remarks(capsys: pytest.CaptureFixture[str]) -> None:
    read(auto_map={"AutoModel": "x.X"}, strange=1, other=2, pretraining_tp=2,
         nothing=None, attention_dropout=0.1)  # fmt: skip
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.splitlines() == [
        "note: m/config.json: ignored, unknown to ftjax: other, strange",
        "note: m/config.json: attention_dropout is not applied in fine-tuning",
        "note: m/config.json: auto_map: the model's own code is never run;"
        " ftjax's is used",
    ]


def test_a_usual_configuration_causes_no_remark(
    capsys: pytest.CaptureFixture[str],
) -> None:
    read(attention_dropout=0.0, use_cache=True, torch_dtype="bfloat16", use_mrope=False,
         quantization_config=None, num_experts=0, use_sliding_window=False,
         sliding_window=4096, max_window_layers=28)  # fmt: skip
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("value", "ids"),
    [(None, ()), (2, (2,)), ([2, 3, 2], (2, 3)), (0, (0,)), (-1, ()), ([], ())],
)
def test_end_tokens(value: Any, ids: tuple[int, ...]) -> None:
    assert token_ids({"eos_token_id": value}, "eos_token_id", "config.json") == ids


@pytest.mark.parametrize("value", ["2", [2, "3"], True, 2.0, {"a": 1}])
def test_end_tokens_that_are_no_ids(value: Any) -> None:
    with pytest.raises(UserError, match="eos_token_id"):
        token_ids({"eos_token_id": value}, "eos_token_id", "config.json")
