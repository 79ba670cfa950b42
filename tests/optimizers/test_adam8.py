"""Adam in 8 bits: bitsandbytes' codes, to the bit, and the bytes that they take."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax.optim import make_optimizer
from ftjax.optimizers.adam8 import Codes, decode, encode
from ftjax.quant.codebooks import DYNAMIC, UNSIGNED
from tests.conftest import ROOT
from tests.goldens import make_adam8
from tests.goldens.weights import exact, random_tensor
from tests.models_small import optim_config

GOLDEN = json.loads((ROOT / "tests" / "goldens" / "adam8.json").read_text())


def wrap(x: Any) -> Any:
    return {"params": {"proj": {"w": jnp.asarray(x)}}}


def test_the_unsigned_table_is_that_of_bitsandbytes() -> None:
    assert exact(UNSIGNED) == GOLDEN["unsigned_map"]


def test_steps_are_those_of_bitsandbytes() -> None:
    """Codes and scales of both moments are equal; weights to the last bit or two."""
    config = optim_config(name="adamw8bit", clip_norm=0.0, **make_adam8.OPTIM)
    tx = make_optimizer(config, make_adam8.STEPS)
    params = wrap(make_adam8.weight())
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(make_adam8.STEPS):
        updates, state = update(wrap(make_adam8.gradient(step)), state, params)
        params = optax.apply_updates(params, updates)
    for moment in ("mu", "nu"):
        found = getattr(state[0], moment)["params"]["proj"]["w"]
        codes = np.frombuffer(bytes.fromhex(GOLDEN[moment]), np.uint8)
        wrong = np.asarray(found.codes).reshape(-1) != codes
        # Where a product and a sum are fused, a number at a tie may fall elsewhere.
        assert wrong.mean() < 1e-3
        scale = np.asarray(GOLDEN[f"{moment}_scale"], np.float32)
        np.testing.assert_allclose(found.scale, scale, rtol=3e-7)
    moved = np.asarray(params["params"]["proj"]["w"]).reshape(-1)
    np.testing.assert_allclose(moved[::41], GOLDEN["every_41st_weight"], atol=2e-7)
    squares = (moved.astype(np.float64) ** 2).sum()
    assert squares == pytest.approx(GOLDEN["sum_of_squares"], rel=1e-6)


@pytest.mark.parametrize("shape", [(64, 256), (2, 96, 16), (3, 5, 77), (4097,)])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(shape: tuple[int, ...], signed: bool) -> None:
    """Blocks run over the flat array, whatever axes it has."""
    table = DYNAMIC if signed else UNSIGNED
    x = random_tensor("codes.embed", shape) ** 3
    x = x if signed else np.abs(x)
    found = encode(jnp.asarray(x), table)
    assert found.codes.shape == shape and found.codes.dtype == jnp.uint8
    flat = np.pad(x.reshape(-1), (0, -x.size % 256)).reshape(-1, 256)
    largest = np.abs(flat).max(1)
    np.testing.assert_array_equal(found.scale, largest)
    gaps = (
        np.abs((flat / largest[:, None])[..., None] - table).min(-1) * largest[:, None]
    )
    errors = np.abs(np.asarray(decode(found, table)) - x).reshape(-1)
    np.testing.assert_allclose(errors, gaps.reshape(-1)[: x.size], atol=1e-6)


def test_bytes_are_those_of_the_buffers() -> None:
    """2 bytes and 2 * 4 / 256 a number; arrays below 4096 numbers stay float32."""
    tx = make_optimizer(optim_config(name="adamw8bit"), 10)
    for size in (4096, 3 * 4096 + 1):
        state = tx.init(wrap(np.zeros(size, np.float32)))
        moments = [x for x in jax.tree.leaves(state) if x.ndim]
        blocks = -(-size // 256)
        assert sum(x.nbytes for x in moments) == 2 * size + 2 * 4 * blocks
    small = tx.init(wrap(np.zeros(4095, np.float32)))
    moments = [x for x in jax.tree.leaves(small) if x.ndim]
    assert {x.dtype.name for x in moments} == {"float32"} and len(moments) == 2


@pytest.mark.parametrize("table", [DYNAMIC, UNSIGNED], ids=["signed", "unsigned"])
def test_a_block_of_zeros_stays_zero(table: np.ndarray) -> None:
    x = jnp.zeros((20, 256)).at[3].set(1.0)
    back = decode(encode(x, table), table)
    np.testing.assert_array_equal(back, x)
    assert isinstance(encode(x, table), Codes)
