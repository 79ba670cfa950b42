"""Mistral 7B and its kin: Llama's maths, with a sliding window in every layer."""

from ftjax.models.config_reader import ConfigReader
from ftjax.models.families.common import dense_spec, layer_count, layer_windows
from ftjax.models.spec import ModelSpec

MODEL_TYPE = "mistral"
ARCHITECTURE = "MistralForCausalLM"


def spec(config: ConfigReader) -> ModelSpec:
    """A null `sliding_window` is full attention; an absent one is 4096 tokens."""
    n_layers = layer_count(config)
    window = config.integer("sliding_window", 4096)
    if config.config.get("sliding_window", window) is None:
        window = 0
    if window and not config.flag("use_sliding_window", True):
        config.refuse("use_sliding_window", "true, or a null sliding_window")
    windows = layer_windows(config, window, [window > 0] * n_layers)
    if len(set(windows)) != 1 or windows[0] != window:
        config.refuse("layer_types", "every layer as sliding_window says")
    return dense_spec(
        config, MODEL_TYPE, max_positions=131072, kv_heads=8, windows=windows
    )
