"""Llama 1, 2, 3.x and what is published as Llama: SmolLM, SmolLM2, TinyLlama."""

from ftjax.models.config_reader import ConfigReader
from ftjax.models.families.common import dense_spec, layer_count, layer_windows
from ftjax.models.spec import ModelSpec

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"


def spec(config: ConfigReader) -> ModelSpec:
    """`attention_bias` is for q, k, v and o; `mlp_bias` for gate, up and down."""
    bias = config.flag("attention_bias", False)
    return dense_spec(
        config,
        MODEL_TYPE,
        max_positions=2048,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
        windows=layer_windows(config, 0, [False] * layer_count(config)),
    )
