"""The models that are measured, and one checkpoint of each, the same for everybody."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.checkpoints.hf_save import save_params
from ftjax.models.names import model_weights
from ftjax.models.presets import PRESETS
from ftjax.models.registry import spec_from_config


@dataclass(frozen=True, eq=False)
class Shape:
    """A model and its batch; `config` is a `config.json`."""

    config: dict[str, Any]
    rows: int
    length: int = 256


def _llama(vocab: int, d_model: int, layers: int, d_ff: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": d_model,
        "intermediate_size": d_ff,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": d_model // 8,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


SHAPES = {
    "S": Shape(_llama(4096, 256, 6, 768), rows=8),
    "M": Shape(_llama(32000, 512, 8, 1536), rows=8),
    "L": Shape(PRESETS["smollm2_135m"].config, rows=4),
}


def write_checkpoint(folder: Path, shape: Shape) -> None:
    """Random float32 weights, N(0, 0.02^2), under their published names."""
    spec = spec_from_config(shape.config, "the benchmark's shape")
    rng = np.random.default_rng(0)
    tree: dict[str, Any] = {}
    for path, weight in model_weights(spec).items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        if path[-1] == "scale":
            node["scale"] = np.ones(weight.leaf_shape, np.float32)
        else:
            values = rng.standard_normal(weight.leaf_shape, np.float32)
            node[path[-1]] = values * np.float32(0.02)
    folder.mkdir(parents=True)
    save_params(folder, tree, spec, config=shape.config, dtype="float32")
