"""Qwen2 and Qwen2.5: a bias on q, k and v, and a sliding window in the upper layers."""

from ftjax.models.config_reader import ConfigReader
from ftjax.models.families.common import dense_spec, upper_windows
from ftjax.models.spec import ModelSpec

MODEL_TYPE = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"


def spec(config: ConfigReader) -> ModelSpec:
    """The bias is part of the architecture: `attention_bias` is read, and ignored.

    (As in transformers. If the bias were missing, the check of the tensors would tell.)
    """
    config.flag("attention_bias", True)
    return dense_spec(
        config,
        MODEL_TYPE,
        max_positions=32768,
        kv_heads=32,
        qkv_bias=True,
        windows=upper_windows(config),
    )
