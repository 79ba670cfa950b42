"""A tree of arrays out to the Hugging Face layout: config.json and safetensors."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ftjax.checkpoints.files import INDEX, SINGLE
from ftjax.checkpoints.heads import head_entry, without_logits
from ftjax.checkpoints.tensors import Entry, write_tensors
from ftjax.models.names import Weight, model_weights
from ftjax.models.spec import ModelSpec

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def save_params(
    folder: Path,
    params: dict[str, Any],
    spec: ModelSpec,
    *,
    config: dict[str, Any],
    dtype: str,
    head: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes `config.json` and safetensors with the published names and shapes.

    Leaf by leaf, so that one leaf is in host memory at a time. Existing files are
    never overwritten. `load_params` gives the same bits back.

    Args:
      folder: exists; the caller renames it into place when all is written.
      params: the tree of `Decoder`.
      config: the model's configuration; its dtype and tied flag are set to what is
        written, and code of the original's own (`auto_map`) is not referred to.
      dtype: 'float32' or 'bfloat16'.
      head: of a reward model, in place of the one of logits; see `heads`.
      max_shard_bytes: begins a new file beyond this; a larger tensor has its own.
    """
    if head is None:
        entries = list(_entries(params, spec))
    else:
        entries = [*_entries(params, without_logits(spec)), head_entry(head)]
    write_shards(folder, entries, DTYPES[dtype], max_shard_bytes)
    write_config(folder, config, spec, dtype)


def write_shards(
    folder: Path,
    entries: Iterable[Entry],
    dtype: np.dtype[Any],
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes tensors to one file, or to several and an index."""
    shards = _shards(list(entries), dtype, max_shard_bytes)
    if len(shards) == 1:
        write_tensors(folder / SINGLE, shards[0], dtype)
        return
    weight_map: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard, dtype)
        weight_map |= {entry.name: name for entry in shard}
        total += sum(entry.nbytes(dtype) for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / INDEX, index)


def write_config(
    folder: Path,
    config: dict[str, Any],
    spec: ModelSpec,
    dtype: str,
    quantization: dict[str, Any] | None = None,
) -> None:
    """The `config.json` of weights that are written as `dtype`, or quantized."""
    dropped = ("auto_map", "dtype", "torch_dtype", "quantization_config")
    kept = {key: value for key, value in config.items() if key not in dropped}
    kept |= {"tie_word_embeddings": spec.tied, "torch_dtype": dtype}
    if quantization:
        kept["quantization_config"] = quantization
    _write_json(folder / "config.json", kept)


def _entries(params: dict[str, Any], spec: ModelSpec) -> Iterator[Entry]:
    """Every tensor to write; the layers of a leaf share one copy of it on the host."""
    for path, weight in model_weights(spec).items():
        leaf: Any = params
        for key in path:
            leaf = leaf[key]
        if leaf.shape != weight.leaf_shape:
            raise ValueError(f"{'/'.join(path)}: {leaf.shape} != {weight.leaf_shape}")
        host = Host(leaf, weight)
        for i, name in enumerate(weight.names):
            yield Entry(name, weight.stored_shape, host.reader(i))


class Host:
    """A leaf, fetched when its first tensor is wanted and let go after its last."""

    def __init__(self, leaf: Any, weight: Weight):
        self.leaf, self.weight = leaf, weight
        self.array: np.ndarray | None = None

    def reader(self, index: int) -> Callable[[], np.ndarray]:
        return lambda: self.stored(index)

    def stored(self, index: int) -> np.ndarray:
        """The tensor of layer `index`, as published: [outputs, inputs]."""
        weight = self.weight
        array = np.asarray(self.leaf) if self.array is None else self.array
        self.array = array if index + 1 < weight.layers else None
        value = array[index] if weight.layers else array
        shape = weight.stored_shape
        if weight.inputs:
            return value.reshape(shape[::-1]).T
        return value.reshape(shape)


def _shards(entries: list[Entry], dtype: np.dtype[Any], most: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        nbytes = entry.nbytes(dtype)
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += nbytes
    return shards


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")
