"""Arrays to disk and back with Orbax: one flat dict, leaf path to array."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.checkpoints.fingerprint import leaf_path
from ftjax.checkpoints.manifest import Leaf
from ftjax.errors import UserError

PyTree = Any
_SHOWN = 10


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of `tree` by path, as in `params/layers/mlp/up_proj/w`.

    Raises:
      TypeError: a leaf is not an array (or a description of one).
      ValueError: two leaves have the same path.
    """
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = leaf_path(path)
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"{name} is {type(leaf).__name__}, not an array")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"{name} is a typed key: use its jax.random.key_data")
        if name in flat:
            raise ValueError(f"two leaves of the state are called {name}")
        flat[name] = leaf
    return flat


def describe(flat: Mapping[str, Any]) -> dict[str, Leaf]:
    """Shape and dtype of every leaf of a flat dict."""
    return {
        name: Leaf(tuple(leaf.shape), str(np.dtype(leaf.dtype)))
        for name, leaf in flat.items()
    }


def nbytes(flat: Mapping[str, Any]) -> int:
    """The bytes that the arrays of a flat dict take."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in flat.values())


def write_arrays(folder: Path, flat: Mapping[str, Any]) -> None:
    """Writes a flat dict; returns when all of it is with the operating system."""
    import orbax.checkpoint as ocp

    # Orbax refuses arrays without elements, and they have nothing to store.
    full = {name: leaf for name, leaf in flat.items() if leaf.size}
    if not full:
        raise ValueError("the state has no arrays to save")
    with _checkpointer() as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(full))


def read_arrays(folder: Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads the leaves of `wanted` onto its shardings (default: the first device)."""
    import orbax.checkpoint as ocp

    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device
        )
        for name, leaf in wanted.items()
    }
    full = {name: leaf for name, leaf in like.items() if leaf.size}
    with _checkpointer() as checkpointer:
        read = checkpointer.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                item=full,
                restore_args=ocp.checkpoint_utils.construct_restore_args(full),
                partial_restore=True,
            ),
        )
    for name, leaf in like.items():
        if not leaf.size:
            read[name] = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    return read


def require_match(
    saved: Mapping[str, Leaf], wanted: Mapping[str, Leaf], *, where: Path, partial: bool
) -> None:
    """Raises a `UserError` unless paths, shapes and dtypes are the same.

    Args:
      saved: the leaves of the checkpoint.
      wanted: the leaves that the program is about to fill.
      where: the checkpoint.
      partial: whether `wanted` may leave some of `saved` out.
    """
    names = sorted(wanted if partial else saved.keys() | wanted.keys())
    faults = [
        f"{name}: saved {saved.get(name, 'none')}, wanted {wanted.get(name, 'none')}"
        for name in names
        if saved.get(name) != wanted.get(name)
    ]
    if faults:
        rest = len(faults) - _SHOWN
        more = [f"and {rest} more"] if rest > 0 else []
        raise UserError(
            f"{len(faults)} arrays of this checkpoint do not fit this run",
            where=where,
            expected="the same names, shapes and dtypes",
            got="\n".join(faults[:_SHOWN] + more),
            fix="use the model, method and optimizer of this run, or another --workdir",
        )


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # Trained floats shrink by 7 % at twice the time of a save.
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
    )
