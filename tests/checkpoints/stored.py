"""A tiny checkpoint that tests take apart, byte by byte where they must."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ftjax.checkpoints.files import INDEX, SINGLE
from ftjax.checkpoints.hf import Weights, open_weights, read_config
from ftjax.errors import UserError
from ftjax.models.names import model_weights
from ftjax.models.registry import spec_from_config
from ftjax.models.spec import ModelSpec
from tests.goldens.weights import random_tensor

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, np.ndarray]
NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(np.float64): "F64",
    np.dtype(np.int8): "I8",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
}


def spec_of(config: dict[str, Any]) -> ModelSpec:
    return spec_from_config(config, "config.json")


def tensors_of(spec: ModelSpec) -> Tensors:
    return {
        name: random_tensor(name, weight.stored_shape)
        for weight in model_weights(spec).values()
        for name in weight.names
    }


def pack(tensors: Tensors, change: Callable[[dict], None] | None = None) -> bytes:
    """A safetensors file; `change` may edit its header."""
    header: dict[str, Any] = {}
    end = 0
    for name, value in tensors.items():
        begin, end = end, end + value.nbytes
        header[name] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [begin, end],
        }
    if change:
        change(header)
    text = json.dumps(header).encode()
    data = b"".join(v.tobytes() for v in tensors.values())
    return struct.pack("<Q", len(text)) + text + data


def write_checkpoint(folder: Path) -> None:
    """A good checkpoint in one file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / SINGLE).write_bytes(pack(tensors_of(spec_of(CONFIG))))


def shard(folder: Path) -> dict[str, str]:
    """Makes two shards and an index of the single file; returns the weight map."""
    tensors = tensors_of(spec_of(CONFIG))
    names = list(tensors)
    (folder / SINGLE).unlink()
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        (folder / file).write_bytes(pack({n: tensors[n] for n in part}))
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def opened(folder: Path, **kwargs: Any) -> Weights:
    return open_weights(folder, spec_of(read_config(folder)), **kwargs)


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        opened(folder)
    assert caught.value.code == 2
    screen = caught.value.screen()
    for word in words:
        assert word in screen, screen
    assert len(screen) < 3000
    return screen
