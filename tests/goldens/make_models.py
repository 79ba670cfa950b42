"""Makes parity.json: logits of tiny random models, by transformers on torch.

Run by hand, from the root of the repository, in an environment with torch and
transformers (the tests need neither):

    python -m tests.goldens.make_models

Each case is a `config.json` as a publisher would write it, in old forms and new ones.
The weights are `weights.random_tensor`; transformers reads both from a folder, as it
would any checkpoint.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.goldens.weights import random_tensor, write_random

OUT = Path(__file__).parent / "parity.json"
LENGTH = 24


def _config(model_type: str, architecture: str, **rest: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": 0,
        **rest,
    }


def _llama(**rest: Any) -> dict[str, Any]:
    return _config("llama", "LlamaForCausalLM", **rest)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_type": "llama3",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}

CASES: dict[str, dict[str, Any]] = {
    "llama_plain_untied": _llama(rms_norm_eps=1e-2, torch_dtype="float32"),
    "llama_defaults": {
        k: v
        for k, v in _llama(tie_word_embeddings=True).items()
        if k not in ("num_key_value_heads", "hidden_act", "max_position_embeddings")
    },
    "llama_llama3_rope": _llama(rope_theta=500.0, rope_scaling=LLAMA3),
    "llama_linear_rope": _llama(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama_yarn_rope": _llama(rope_parameters=YARN | {"rope_theta": 100.0}),
    "llama_yarn_rope_settings": _llama(
        rope_theta=1000.0,
        rope_scaling=YARN
        | {"beta_fast": 4, "beta_slow": 0.5, "truncate": False, "mscale": 2.0}
        | {"mscale_all_dim": 0.5},
    ),
    "llama_yarn_attention_factor": _llama(
        rope_scaling=YARN | {"attention_factor": 1.5}
    ),
    "llama_biases": _llama(attention_bias=True, mlp_bias=True),
    "llama_head_dim": _llama(head_dim=12),
    "llama_tied_but_stored_head": _llama(tie_word_embeddings=True),
    "mistral_window": _config(
        "mistral", "MistralForCausalLM", sliding_window=5, rope_theta=300.0
    ),
    "mistral_full": _config(
        "mistral", "MistralForCausalLM", sliding_window=None, head_dim=16
    ),
    "qwen2_tied": _config("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True,
        sliding_window=4, use_sliding_window=False, rope_theta=1e6),
    "qwen2_upper_windows": _config("qwen2", "Qwen2ForCausalLM",
        sliding_window=6, use_sliding_window=True, max_window_layers=1),
    "qwen2_layer_types": _config("qwen2", "Qwen2ForCausalLM",
        sliding_window=6, use_sliding_window=True, max_window_layers=2,
        layer_types=["sliding_attention", "full_attention"]),
    "qwen3_tied": _config("qwen3", "Qwen3ForCausalLM", tie_word_embeddings=True,
        head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "qwen3_bias_windows": _config("qwen3", "Qwen3ForCausalLM", head_dim=8,
        attention_bias=True, sliding_window=7, use_sliding_window=True,
        max_window_layers=0, rope_theta=1e6),
    "smollm3_nope": _config("smollm3", "SmolLM3ForCausalLM", num_hidden_layers=4),
    "smollm3_nope_windows": _config("smollm3", "SmolLM3ForCausalLM",
        no_rope_layers=[0, 1], use_sliding_window=True, sliding_window=5,
        tie_word_embeddings=False, mlp_bias=True, rope_theta=50.0),
}  # fmt: skip


def token_ids() -> list[int]:
    """The prompt of every case."""
    return [(7 * i * i + 3 * i + 1) % 32 for i in range(LENGTH)]


def run(config: dict[str, Any]) -> dict[str, Any]:
    """The names and shapes of the tensors, and the logits [T, V]."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
        tied = config.get("tie_word_embeddings", config["model_type"] == "smollm3")
        if tied and not config.get("stored_head"):
            del shapes["lm_head.weight"]
        write_random(folder / "model.safetensors", shapes)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        first = next(iter(shapes))
        read = model.state_dict()[first].numpy()
        assert (read == random_tensor(first, read.shape)).all()
        with torch.no_grad():
            logits = model(torch.tensor([token_ids()])).logits[0].double()
    return {
        "config": config,
        "tensors": shapes,
        "logits": [[round(x, 5) for x in row] for row in logits.tolist()],
    }


def main() -> None:
    """Writes every case to parity.json."""
    import torch
    import transformers

    cases = {}
    for name, config in CASES.items():
        # A key that no model knows is ignored by transformers, with a remark by ftjax.
        extra = {"stored_head": True} if name.endswith("stored_head") else {}
        cases[name] = run(config | extra)
        print(name)
    made_with = f"torch {torch.__version__}, transformers {transformers.__version__}"
    golden = {"made_with": made_with, "ids": token_ids(), "cases": cases}
    OUT.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
