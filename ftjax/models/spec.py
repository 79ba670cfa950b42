"""What a decoder is, in numbers: everything in a `config.json` that changes the maths.

A `ModelSpec` is made by a family's file from the published configuration, is hashable,
and is all that `Decoder` needs. No JAX here, so that a wrong configuration is found
before anything heavy is imported.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and how it is stretched.

    `kind` is 'default', 'linear' (positions / factor), 'llama3' (Llama 3.1's
    frequency-dependent factor) or 'yarn' (arXiv 2309.00071). `attention_factor`
    multiplies cos and sin, as yarn does; 1 elsewhere. `original_max_positions` is the
    context that the base was trained on before stretching.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """The shape and the maths of a pre-norm, gated-MLP, rotary decoder.

    `windows` and `rope_layers` are per layer: the sliding window in tokens (0: full
    attention) and whether the layer rotates its queries and keys; an empty tuple means
    full attention, and rotation, everywhere.
    """

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float = 1e-5
    max_positions: int = 2048
    rope: Rope = Rope()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    windows: tuple[int, ...] = ()
    rope_layers: tuple[bool, ...] = ()
