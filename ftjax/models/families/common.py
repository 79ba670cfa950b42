"""What the families share: the keys that mean the same in every one of them."""

from ftjax.errors import UserError
from ftjax.models.config_reader import ConfigReader
from ftjax.models.rope_config import read_rope
from ftjax.models.spec import ModelSpec

MOST_LAYERS = 1024
FULL, SLIDING = "full_attention", "sliding_attention"
ESSENTIAL = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def dense_spec(
    config: ConfigReader,
    family: str,
    *,
    max_positions: int,
    kv_heads: int = 0,
    head_dim: int = 0,
    theta: float = 10000.0,
    tied: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    windows: tuple[int, ...] = (),
    rope_layers: tuple[bool, ...] = (),
) -> ModelSpec:
    """Reads the common keys; the arguments are the defaults of the model type.

    `kv_heads` and `head_dim` of 0 mean `num_attention_heads` and
    `hidden_size / num_attention_heads`.
    """
    config.require(*ESSENTIAL)
    d_model = config.integer("hidden_size", 0)
    n_heads = config.integer("num_attention_heads", 0)
    longest = config.integer("max_position_embeddings", max_positions)
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        config.refuse("hidden_act", "silu (the gated MLP of this family)")
    return ModelSpec(
        family=family,
        vocab_size=config.integer("vocab_size", 0),
        d_model=d_model,
        n_layers=layer_count(config),
        n_heads=n_heads,
        n_kv_heads=_kv_heads(config, n_heads, kv_heads),
        head_dim=_head_dim(config, d_model, n_heads, head_dim),
        d_ff=config.integer("intermediate_size", 0),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        max_positions=longest,
        rope=read_rope(config, theta=theta, max_positions=longest),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tied=config.flag("tie_word_embeddings", tied),
        windows=windows if any(windows) else (),
        rope_layers=() if all(rope_layers) else rope_layers,
    )


def layer_count(config: ConfigReader) -> int:
    """The number of layers, within reason: per-layer settings are built from it."""
    config.require(*ESSENTIAL)
    n_layers = config.integer("num_hidden_layers", 0)
    if n_layers > MOST_LAYERS:
        config.refuse("num_hidden_layers", f"at most {MOST_LAYERS} layers")
    return n_layers


def layer_windows(
    config: ConfigReader, window: int, sliding: list[bool]
) -> tuple[int, ...]:
    """The sliding window of each layer, in tokens; 0 is full attention.

    `layer_types` says which layers slide; where it is absent, `sliding` does.
    """
    types = config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != len(sliding):
            config.refuse("layer_types", f"a list with one type for each of "
                          f"{len(sliding)} layers")  # fmt: skip
        if not set(map(str, types)) <= {FULL, SLIDING}:
            config.refuse("layer_types", f"{FULL} and {SLIDING} only")
        sliding = [kind == SLIDING for kind in types]
        if any(sliding) and not window:
            config.refuse("layer_types", f"no {SLIDING} where no window is set")
    return tuple(window if slides else 0 for slides in sliding)


def upper_windows(config: ConfigReader) -> tuple[int, ...]:
    """Qwen's rule: if `use_sliding_window`, the layers from `max_window_layers` on."""
    n_layers = layer_count(config)
    window = config.integer("sliding_window", 4096)
    first = config.integer("max_window_layers", 28, minimum=0)
    if not config.flag("use_sliding_window", False) or "sliding_window" in (
        key for key, value in config.config.items() if value is None
    ):
        window = 0
    return layer_windows(
        config, window, [bool(window) and i >= first for i in range(n_layers)]
    )


def _kv_heads(config: ConfigReader, n_heads: int, default: int) -> int:
    # A null means one kv head per head; an absent key means the type's own default.
    absent = "num_key_value_heads" not in config.config
    n_kv_heads = config.integer(
        "num_key_value_heads", (default if absent else 0) or n_heads
    )
    if n_heads % n_kv_heads:
        config.refuse("num_key_value_heads", f"a divisor of {n_heads} heads")
    return n_kv_heads


def _head_dim(config: ConfigReader, d_model: int, n_heads: int, default: int) -> int:
    if config.get("head_dim") is None and not default and d_model % n_heads:
        raise UserError(
            "hidden_size is not a multiple of num_attention_heads, and there is no"
            " head_dim",
            where=config.where,
            expected=f"head_dim, or a hidden_size divisible by {n_heads}",
            got=f"hidden_size = {d_model}",
            fix="take the config.json that was published with the weights",
        )
    head_dim = config.integer("head_dim", default or d_model // n_heads)
    if head_dim % 2:
        config.refuse("head_dim", "an even number: rotary embedding turns pairs")
    return head_dim
