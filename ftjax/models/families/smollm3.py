"""SmolLM3: Llama's maths, with no rotary embedding in every fourth layer (NoPE)."""

from ftjax.models.config_reader import ConfigReader
from ftjax.models.families.common import dense_spec, layer_count, layer_windows
from ftjax.models.spec import ModelSpec

MODEL_TYPE = "smollm3"
ARCHITECTURE = "SmolLM3ForCausalLM"


def spec(config: ConfigReader) -> ModelSpec:
    """A 1 in `no_rope_layers` means, in spite of its name, that the layer rotates."""
    n_layers = layer_count(config)
    rotates = _rope_layers(config, n_layers)
    window = config.integer("sliding_window", 1) * config.flag(
        "use_sliding_window", False
    )
    if config.get("sliding_window") is None:
        window = 0
    bias = config.flag("attention_bias", False)
    return dense_spec(
        config,
        MODEL_TYPE,
        max_positions=32768,
        kv_heads=4,
        theta=2000000.0,
        tied=True,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
        windows=layer_windows(config, window, [window > 0 and not r for r in rotates]),
        rope_layers=rotates,
    )


def _rope_layers(config: ConfigReader, n_layers: int) -> tuple[bool, ...]:
    interval = config.integer("no_rope_layer_interval", 4)
    flags = config.get("no_rope_layers")
    if flags is None:
        return tuple((i + 1) % interval != 0 for i in range(n_layers))
    if not isinstance(flags, list) or len(flags) < n_layers:
        config.refuse("no_rope_layers", f"a list of 0 or 1 for {n_layers} layers")
    if any(flag not in (0, 1) for flag in flags):
        config.refuse("no_rope_layers", "0 or 1 for each layer")
    return tuple(bool(flag) for flag in flags[:n_layers])
