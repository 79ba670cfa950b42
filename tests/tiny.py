"""Tiny checkpoints in the Hugging Face layout, made in milliseconds without torch.

The weights are random from a fixed seed, but not degenerate: norms are near one and
biases differ from zero, so that a forgotten one changes the logits.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

SPECIAL = ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>")
PAD, BOS, IM_START, IM_END = range(4)

# A few merges, so that a token may straddle the end of a prompt.
MERGES = (
    "t h",
    "Ġ t",
    "Ġt h",
    "Ġth e",
    "i n",
    "in g",
    "e r",
    "Ġ a",
    "o n",
    "r e",
    "Ċ Ċ",
)

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|im_end|>' -}}"
    "{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- endif -%}"
)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "tie_word_embeddings": True,
        "head_dim": 32,
        "use_sliding_window": False,
    },
}


def make_tiny_checkpoint(
    folder: str | Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
    add_bos: bool = True,
    **config_overrides: Any,
) -> Path:
    """Writes a tiny checkpoint with tokenizer and chat template; returns its folder.

    Args:
      folder: where to; made if missing.
      family: 'llama', 'mistral', 'qwen2' or 'qwen3' (SmolLM2 is a tied 'llama').
      seed: of the weights; another seed is another base of the same shapes.
      dtype: 'float32', 'bfloat16' or 'float16', as stored.
      shards: above 1, that many files and an index.
      add_bos: whether the tokenizer puts BOS before every text.
      **config_overrides: keys of config.json, also those that change the shapes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(folder, add_bos=add_bos)
    config = _config(family, tokenizer.get_vocab_size(), dtype) | config_overrides
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": BOS,
            "do_sample": False,
            "eos_token_id": config["eos_token_id"],
            "pad_token_id": PAD,
        },
    )
    _write_weights(folder, random_weights(config, seed), dtype, shards)
    return folder


def make_tiny_tokenizer(folder: Path, *, add_bos: bool = True) -> Tokenizer:
    """Writes a byte-level BPE tokenizer: 4 specials, 256 bytes, a few merges."""
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = [(left, right) for left, right in (merge.split() for merge in MERGES)]
    pieces += [left + right for left, right in pairs]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    )
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[BOS]} $A",
            pair=f"{SPECIAL[BOS]} $A {SPECIAL[BOS]} $B",
            special_tokens=[(SPECIAL[BOS], BOS)],
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": SPECIAL[BOS],
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": SPECIAL[IM_END],
            "model_max_length": 512,
            "pad_token": SPECIAL[PAD],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    return tokenizer


def random_weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random float32 weights under their Hugging Face names, for this config.json."""
    rng = np.random.default_rng(seed)
    D, F, V = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    N, K = config["num_attention_heads"], config["num_key_value_heads"]
    H = config.get("head_dim") or D // N
    qkv_bias = config.get("attention_bias") or config["model_type"] == "qwen2"

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)

    def near(value: float, size: int) -> np.ndarray:
        return (value + rng.normal(0, 0.1, size)).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(V, D)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, heads in (("q_proj", N), ("k_proj", K), ("v_proj", K)):
            weights[f"{layer}self_attn.{name}.weight"] = matrix(heads * H, D)
            if qkv_bias:
                weights[f"{layer}self_attn.{name}.bias"] = near(0, heads * H)
        weights[f"{layer}self_attn.o_proj.weight"] = matrix(D, N * H)
        if config.get("attention_bias"):
            weights[f"{layer}self_attn.o_proj.bias"] = near(0, D)
        if config["model_type"] == "qwen3":
            weights[f"{layer}self_attn.q_norm.weight"] = near(1, H)
            weights[f"{layer}self_attn.k_norm.weight"] = near(1, H)
        for name, rows, columns in (
            ("gate_proj", F, D),
            ("up_proj", F, D),
            ("down_proj", D, F),
        ):
            weights[f"{layer}mlp.{name}.weight"] = matrix(rows, columns)
            if config.get("mlp_bias"):
                weights[f"{layer}mlp.{name}.bias"] = near(0, rows)
        weights[f"{layer}input_layernorm.weight"] = near(1, D)
        weights[f"{layer}post_attention_layernorm.weight"] = near(1, D)
    weights["model.norm.weight"] = near(1, D)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(V, D)
    return weights


def _config(family: str, vocab_size: int, dtype: str) -> dict[str, Any]:
    common = {
        "attention_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": IM_END,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "model_type": family,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": PAD,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vocab_size": vocab_size,
    }
    return common | FAMILIES[family]


def _write_weights(
    folder: Path, weights: dict[str, np.ndarray], dtype: str, shards: int
) -> None:
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    weights = {name: w.astype(stored) for name, w in weights.items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(weights)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
