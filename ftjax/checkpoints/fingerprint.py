"""One hash for a tree of arrays: does this adapter belong to that base?"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

PyTree = Any

_CHUNK_BYTES = 64 << 20
_THREADS = 4  # hashlib leaves the interpreter lock alone while it hashes


def tree_hash(tree: PyTree) -> str:
    """SHA-256 over the paths, shapes, dtypes and bytes of all leaves.

    The same values give the same hash on any mesh, in any container whose leaf paths
    read the same, and whatever the order of its leaves. Leaves are read in blocks of
    rows, so that host memory stays within a few blocks.

    Args:
      tree: a pytree of `jax.Array`s (all shards addressable) or numpy arrays.

    Returns:
      64 hexadecimal digits.
    """
    leaves = [(leaf_path(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(_leaf_hash, [leaf for _, leaf in leaves]))
    lines = sorted(
        f"{path} {leaf.dtype} {tuple(leaf.shape)} {digest}\n"
        for (path, leaf), digest in zip(leaves, digests, strict=True)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def leaf_path(path: tuple[Any, ...]) -> str:
    """A key path as text, as in `layers/self_attn/q_proj/w`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaf_hash(leaf: jax.Array | np.ndarray) -> str:
    digest = hashlib.sha256()
    for block in _blocks(leaf):
        # bfloat16 has no buffer protocol; its bytes do.
        digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _blocks(leaf: jax.Array | np.ndarray) -> Iterator[np.ndarray]:
    """The rows of `leaf` in order: a view where the host holds it, else in copies."""
    on_host = isinstance(leaf, np.ndarray) or (
        len(leaf.devices()) == 1 and all(d.platform == "cpu" for d in leaf.devices())
    )
    if on_host or leaf.nbytes <= _CHUNK_BYTES:
        yield np.asarray(leaf)
        return
    rows = max(1, _CHUNK_BYTES * leaf.shape[0] // leaf.nbytes)
    for start in range(0, leaf.shape[0], rows):
        yield np.asarray(leaf[start : start + rows])
