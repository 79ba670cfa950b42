"""A process that does nothing but save; the tests kill it.

    python saver.py FOLDER FLOATS_PER_ARRAY

It goes on from the newest step, says `ready N`, and then `saved N` after each save. The
state of step n is a function of n, so that anybody can tell whether it came back whole.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint  # noqa: F401  its import shall not be what is killed

from ftjax.checkpoints.state import Checkpoints

ARRAYS = 4


def state_at(step: int, floats: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    arrays = {f"w{i}": jnp.asarray(rng.random(floats, "f4")) for i in range(ARRAYS)}
    return arrays | {"step": jnp.asarray(step)}


def like(floats: int) -> dict[str, Any]:
    arrays = {f"w{i}": jax.ShapeDtypeStruct((floats,), "f4") for i in range(ARRAYS)}
    return arrays | {"step": jax.ShapeDtypeStruct((), jnp.int32)}


def main(folder: str, floats: int) -> None:
    checkpoints = Checkpoints(Path(folder), keep_last=2, keep_best=1)
    checkpoints.clean()
    start = checkpoints.latest() or 0
    print("ready", start, flush=True)
    for step in itertools.count(start + 1):
        checkpoints.save(step, state_at(step, floats), {"step": step}, step % 7)
        print("saved", step, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
