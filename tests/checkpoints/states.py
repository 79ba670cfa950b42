"""A small state, and a folder of checkpoints of it."""

from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftjax.checkpoints.state import Checkpoints


@flax.struct.dataclass
class State:
    step: jax.Array
    trained: Any
    optimizer: Any
    key: jax.Array


def make_state(seed: int = 0) -> State:
    key = jax.random.PRNGKey(seed)
    trained = {
        "layers": {"q_proj": {"w": jax.random.normal(key, (3, 8, 4))}},
        "norm": {"scale": jax.random.normal(key, (8,), jnp.bfloat16)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return State(jnp.asarray(seed), trained, optimizer.init(trained), key)


def abstract(tree: Any, sharding: Any = None) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def assert_same(left: Any, right: Any) -> None:
    assert str(jax.tree.structure(left)) == str(jax.tree.structure(right))
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


class Run:
    """Checkpoints of small states, and what they reported."""

    def __init__(self, folder: Path, **settings: Any):
        self.said: list[str] = []
        settings = {"keep_last": 9, "report": self.said.append, **settings}
        self.checkpoints = Checkpoints(folder, **settings)

    def save(self, *steps: int, metric: float | None = None) -> None:
        for step in steps:
            self.checkpoints.save(step, make_state(step), {"position": step}, metric)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
