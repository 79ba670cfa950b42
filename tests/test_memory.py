"""The estimate of memory holds against what XLA says of the compiled step."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from ftjax.memory import estimate
from ftjax.methods.method import plan_method
from ftjax.models.decoder import Decoder
from ftjax.models.proj import abstract_params
from ftjax.models.spec import ModelSpec
from ftjax.objectives.causal import causal
from ftjax.optim import make_optimizer
from ftjax.prepare import Shape
from ftjax.sharding import make_mesh
from ftjax.step import init_state, make_train_step
from tests.models_small import lora_config, optim_config

SPEC = ModelSpec("llama", 512, 64, 4, 4, 2, 16, 160, tied=True)
ROWS, LENGTH = 16, 128


@pytest.mark.parametrize(
    ("method", "remat"),
    [(m, r) for m in ("lora", "full") for r in ("none", "dots", "full")]
    + [("dora", "none"), ("dora", "dots")],
)
def test_estimate_bounds_the_compiled_step(method: str, remat: str) -> None:
    model = Decoder(SPEC, remat=remat)
    name = "lora" if method == "dora" else method
    settings = lora_config(name=name, rank=8, init="kaiming", use_dora=method == "dora")
    plan = plan_method(model, settings)
    trained, frozen = jax.eval_shape(
        lambda p: plan.start({"params": p}, 0), abstract_params(model)
    )
    tx = make_optimizer(optim_config(), 10)
    state = jax.eval_shape(lambda t: init_state(t, tx, 0), trained)
    row = jax.ShapeDtypeStruct((1, ROWS, LENGTH), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segments"), row)
    batch["weights"] = jax.ShapeDtypeStruct(row.shape, jnp.float32)
    step = jax.jit(make_train_step(causal(model, 32), tx), donate_argnums=0)
    found = step.lower(state, frozen, batch).compile().memory_analysis()
    assert found is not None
    real = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )
    config = SimpleNamespace(
        optim=optim_config(),
        train=SimpleNamespace(batch_size=ROWS * 4, accumulate=1),
        model=SimpleNamespace(remat=remat),
        method=settings,
        loss=SimpleNamespace(chunk=32),
    )
    shape = Shape(
        model,
        plan,
        {},
        jnp.dtype(jnp.float32),
        jnp.dtype(jnp.float32),
    )
    # Four devices with 16 rows each hold what one device with 16 rows holds.
    sizes = estimate(config, shape, LENGTH, make_mesh(4, 1))
    assert sizes["total"] == sum(v for k, v in sizes.items() if k != "total")
    assert 0.6 * real < sizes["total"] < 2 * real, (sizes, real)
