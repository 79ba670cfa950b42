"""Where arrays live: the mesh, the logical-axis rules, and shardings made from them.

A weight names its axes ('embed', 'heads', ...); a rule says which mesh axis each name
is split over. Batches are split over all data-like mesh axes. One device is a mesh of
one, so there is a single code path.
"""

import logging
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax.errors import UserError

BATCH_AXES = ("data", "fsdp")
RULES: dict[str, str] = {"embed": "fsdp"}

Axes = tuple[str | None, ...]


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """A mesh of all local devices; one of the two sizes may be -1, what is left.

    Raises:
      UserError: if the product is not the number of devices.
    """
    count = jax.device_count()
    sizes = {"data": data, "fsdp": fsdp}
    free = [name for name, size in sizes.items() if size == -1]
    for name, size in sizes.items():
        if size == 0 or size < -1:
            raise UserError(
                f"a mesh axis cannot have size {size}",
                where=f"config.mesh.{name}",
                expected="a positive number, or -1 for what is left",
            )
    if len(free) > 1:
        raise UserError(
            "two mesh axes ask for what is left",
            where="config.mesh",
            expected="at most one -1",
            got=f"data={data}, fsdp={fsdp}",
        )
    if free:
        sizes[free[0]] = max(1, count // -(data * fsdp))
    if sizes["data"] * sizes["fsdp"] != count:
        raise UserError(
            "the mesh does not use the devices that there are",
            where="config.mesh",
            expected=f"data * fsdp = {count} devices",
            got=f"data={data}, fsdp={fsdp}",
            fix=f"--config.mesh.data=-1 --config.mesh.fsdp=F with F dividing {count}",
        )
    return jax.make_mesh(
        (sizes["data"], sizes["fsdp"]), BATCH_AXES, axis_types=(AxisType.Auto,) * 2
    )


def named(mesh: Mesh, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array with these logical axes.

    A mesh axis that does not divide the dimension is dropped, and logged.
    """
    parts: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        axis = RULES.get(name) if name else None
        if axis and size % mesh.shape[axis]:
            logging.info("%s of %d is not split over %s", name, size, axis)
            axis = None
        parts.append(axis)
    return NamedSharding(mesh, P(*parts))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def shard_tree(tree: Any, axes: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of shaped leaves, from the tree of their logical axes."""
    return jax.tree.map(lambda leaf, a: named(mesh, a, leaf.shape), tree, axes)


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Rows over every data-like axis; `leading` unsplit axes (micro-batches) first."""
    return NamedSharding(mesh, P(*[None] * leading, BATCH_AXES))


def put_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> Any:
    """A host batch, on its devices."""
    return {name: jax.device_put(array, sharding) for name, array in batch.items()}


def constrain_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Keeps activations split by rows, so that weights are what is gathered (FSDP)."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))
