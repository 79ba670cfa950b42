"""Qwen3 (dense): an RMS norm on each head of q and k, and a head_dim of its own."""

from ftjax.models.config_reader import ConfigReader
from ftjax.models.families.common import dense_spec, upper_windows
from ftjax.models.spec import ModelSpec

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"


def spec(config: ConfigReader) -> ModelSpec:
    """`head_dim` defaults to 128, whatever the width of the model is."""
    bias = config.flag("attention_bias", False)
    return dense_spec(
        config,
        MODEL_TYPE,
        max_positions=32768,
        kv_heads=32,
        head_dim=128,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        windows=upper_windows(config),
    )
