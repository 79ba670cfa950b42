"""Well-known models by name: their configuration, and where the Hub keeps them.

A preset is enough to plan a run, count parameters or train from scratch without a
download; its configuration is what the publisher's `config.json` says.
"""

from dataclasses import dataclass
from typing import Any

from ftjax.models.registry import spec_from_config
from ftjax.models.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class Preset:
    """A published model: its name on the Hub, and its `config.json`."""

    hub: str
    config: dict[str, Any]

    @property
    def spec(self) -> ModelSpec:
        return spec_from_config(self.config, f"the preset of {self.hub}")


def _config(
    family: tuple[str, str],
    vocab: int,
    d_model: int,
    d_ff: int,
    n_layers: int,
    heads: tuple[int, int, int],
    **rest: Any,
) -> dict[str, Any]:
    """`family` is (model_type, architecture); `heads` (heads, kv heads, head_dim)."""
    return {
        "architectures": [family[1]],
        "model_type": family[0],
        "vocab_size": vocab,
        "hidden_size": d_model,
        "intermediate_size": d_ff,
        "num_hidden_layers": n_layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "hidden_act": "silu",
        **rest,
    }


_LLAMA = ("llama", "LlamaForCausalLM")
_MISTRAL = ("mistral", "MistralForCausalLM")
_QWEN2 = ("qwen2", "Qwen2ForCausalLM")
_QWEN3 = ("qwen3", "Qwen3ForCausalLM")
_SMOLLM3 = ("smollm3", "SmolLM3ForCausalLM")


def _settings(
    positions: int, theta: float, eps: float, *, tied: bool, **rest: Any
) -> dict[str, Any]:
    return {
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "rms_norm_eps": eps,
        "tie_word_embeddings": tied,
        **rest,
    }


def _llama3_scaling(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_LLAMA2 = _settings(4096, 1e4, 1e-5, tied=False, bos_token_id=1, eos_token_id=2)
_LLAMA3_IDS = {"bos_token_id": 128000, "eos_token_id": 128001}
_LLAMA31 = _settings(
    131072, 5e5, 1e-5, tied=False, rope_scaling=_llama3_scaling(8.0), **_LLAMA3_IDS
)
_LLAMA32 = _settings(
    131072, 5e5, 1e-5, tied=True, rope_scaling=_llama3_scaling(32.0), **_LLAMA3_IDS
)
_MISTRAL7 = _settings(
    32768, 1e4, 1e-5, tied=False, sliding_window=4096, bos_token_id=1, eos_token_id=2
)
_QWEN_IDS = {"bos_token_id": 151643, "eos_token_id": 151643}
_QWEN25 = _settings(131072, 1e6, 1e-6, tied=True, **_QWEN_IDS)
_QWEN3_SMALL = _settings(40960, 1e6, 1e-6, tied=True, bos_token_id=151643,
                         eos_token_id=151645)  # fmt: skip
_SMOLLM2 = _settings(8192, 1e5, 1e-5, tied=True, bos_token_id=0, eos_token_id=0)

PRESETS: dict[str, Preset] = {
    "llama2_7b": Preset(
        "meta-llama/Llama-2-7b-hf",
        _config(_LLAMA, 32000, 4096, 11008, 32, (32, 32, 128), **_LLAMA2),
    ),
    "llama2_13b": Preset(
        "meta-llama/Llama-2-13b-hf",
        _config(_LLAMA, 32000, 5120, 13824, 40, (40, 40, 128), **_LLAMA2),
    ),
    "llama2_70b": Preset(
        "meta-llama/Llama-2-70b-hf",
        _config(_LLAMA, 32000, 8192, 28672, 80, (64, 8, 128), **_LLAMA2),
    ),
    "llama3_8b": Preset(
        "meta-llama/Llama-3.1-8B",
        _config(_LLAMA, 128256, 4096, 14336, 32, (32, 8, 128), **_LLAMA31),
    ),
    "llama3_1b": Preset(
        "meta-llama/Llama-3.2-1B",
        _config(_LLAMA, 128256, 2048, 8192, 16, (32, 8, 64), **_LLAMA32),
    ),
    "llama3_3b": Preset(
        "meta-llama/Llama-3.2-3B",
        _config(_LLAMA, 128256, 3072, 8192, 28, (24, 8, 128), **_LLAMA32),
    ),
    "tinyllama_1b": Preset(
        "TinyLlama/TinyLlama_v1.1",
        _config(
            _LLAMA,
            32000,
            2048,
            5632,
            22,
            (32, 4, 64),
            **_LLAMA2 | {"max_position_embeddings": 2048},
        ),
    ),
    "mistral_7b": Preset(
        "mistralai/Mistral-7B-v0.1",
        _config(_MISTRAL, 32000, 4096, 14336, 32, (32, 8, 128), **_MISTRAL7),
    ),
    "qwen2_0_5b": Preset(
        "Qwen/Qwen2.5-0.5B",
        _config(
            _QWEN2,
            151936,
            896,
            4864,
            24,
            (14, 2, 64),
            **_QWEN25 | {"max_position_embeddings": 32768},
        ),
    ),
    "qwen2_1_5b": Preset(
        "Qwen/Qwen2.5-1.5B",
        _config(_QWEN2, 151936, 1536, 8960, 28, (12, 2, 128), **_QWEN25),
    ),
    "qwen2_7b": Preset(
        "Qwen/Qwen2.5-7B",
        _config(
            _QWEN2,
            152064,
            3584,
            18944,
            28,
            (28, 4, 128),
            **_QWEN25 | {"tie_word_embeddings": False},
        ),
    ),
    "qwen3_0_6b": Preset(
        "Qwen/Qwen3-0.6B",
        _config(_QWEN3, 151936, 1024, 3072, 28, (16, 8, 128), **_QWEN3_SMALL),
    ),
    "qwen3_1_7b": Preset(
        "Qwen/Qwen3-1.7B",
        _config(_QWEN3, 151936, 2048, 6144, 28, (16, 8, 128), **_QWEN3_SMALL),
    ),
    "qwen3_4b": Preset(
        "Qwen/Qwen3-4B",
        _config(_QWEN3, 151936, 2560, 9728, 36, (32, 8, 128), **_QWEN3_SMALL),
    ),
    "qwen3_8b": Preset(
        "Qwen/Qwen3-8B",
        _config(
            _QWEN3,
            151936,
            4096,
            12288,
            36,
            (32, 8, 128),
            **_QWEN3_SMALL | {"tie_word_embeddings": False},
        ),
    ),
    "smollm2_135m": Preset(
        "HuggingFaceTB/SmolLM2-135M",
        _config(_LLAMA, 49152, 576, 1536, 30, (9, 3, 64), **_SMOLLM2),
    ),
    "smollm2_360m": Preset(
        "HuggingFaceTB/SmolLM2-360M",
        _config(_LLAMA, 49152, 960, 2560, 32, (15, 5, 64), **_SMOLLM2),
    ),
    "smollm2_1_7b": Preset(
        "HuggingFaceTB/SmolLM2-1.7B",
        _config(
            _LLAMA,
            49152,
            2048,
            8192,
            24,
            (32, 32, 64),
            **_SMOLLM2 | {"rope_theta": 1.3e5},
        ),
    ),
    "smollm3_3b": Preset(
        "HuggingFaceTB/SmolLM3-3B",
        _config(
            _SMOLLM3,
            128256,
            2048,
            11008,
            36,
            (16, 4, 128),
            **_settings(65536, 5e6, 1e-6, tied=True, no_rope_layer_interval=4),
            bos_token_id=128000,
            eos_token_id=128012,
            pad_token_id=128004,
        ),
    ),
}
