"""A small model with a window, a layer without rotation, grouped and normed queries."""

from ftjax.models.spec import ModelSpec

SPEC = ModelSpec(
    family="test",
    vocab_size=48,
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=48,
    max_positions=64,
    qkv_bias=True,
    qk_norm=True,
    tied=True,
    windows=(0, 5, 0),
    rope_layers=(True, True, False),
)
