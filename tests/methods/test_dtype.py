"""What a method makes may be stored in bfloat16; the rest of the step is float32."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import method_config
from ftjax.checkpoints.peft_others import KINDS, load_any, save_any
from ftjax.checkpoints.state import Checkpoints
from ftjax.methods.method import plan_method
from ftjax.models.cached import split_layers
from ftjax.models.decoder import hidden_and_head
from ftjax.models.proj import find_sites
from ftjax.objectives.causal import causal
from ftjax.optim import make_optimizer
from ftjax.step import init_state, make_train_step
from ftjax.weights import join
from tests.models_small import SPEC, micro, optim_config, small_batch, small_model

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4, "use_dora": True},
    "ia3": {},
    "bottleneck": {"also_train": ".*norm"},
    "prompt": {"tokens": 4},
    "prefix": {"tokens": 4},
}


def dtypes(tree: Any) -> set[str]:
    """Of all leaves but scales, which are never trained."""
    return {
        str(leaf.dtype)
        for path, leaf in jax.tree.leaves_with_path(tree)
        if getattr(path[-1], "name", "") != "scale"
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_step_and_a_resume_and_an_export_in_bfloat16(
    name: str, tmp_path: Path
) -> None:
    model, params = small_model()
    settings = method_config("lora" if name == "dora" else name).to_dict()
    settings |= METHODS[name] | {"dtype": "bfloat16"}
    method = plan_method(model, SimpleNamespace(**settings))
    trained, frozen = method.start({"params": params}, 0)
    own = {kind: tree for kind, tree in trained.items() if kind != "params"}
    assert dtypes(own) == {"bfloat16"}
    assert dtypes(trained.get("params", {})) <= {"float32"}
    tx = make_optimizer(optim_config(lr=1e-2, weight_decay=0.1), 10)
    state = init_state(trained, tx, 0)
    assert "bfloat16" not in dtypes(state.opt_state)
    step = jax.jit(make_train_step(causal(model, 8), tx))
    losses = []
    for _ in range(3):
        state, metrics = step(state, frozen, micro(small_batch(), 2))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] and int(state.skipped) == 0
    assert jax.tree.map(lambda x: x.dtype, state.trained) == jax.tree.map(
        lambda s: s.dtype, {n: part.shapes for n, part in method.parts.items()}
    )

    with Checkpoints(tmp_path / "checkpoints") as saved:
        saved.save(3, state, {})
        back = saved.restore(3, state)
    jax.tree.map(np.testing.assert_array_equal, back, state)

    variables = join(frozen, state.trained)
    hidden = hidden_and_head(model, variables, small_batch())[0]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), variables)
    wanted = hidden_and_head(model, wide, small_batch())[0]
    np.testing.assert_allclose(hidden, wanted, atol=1e-5)
    split_layers(variables, jnp.float32)
    (kind,) = own
    if kind in KINDS:
        sites = find_sites(model)
        save_any(tmp_path / "adapter", state.trained, method.lora, sites, "base", None)
        tree = load_any(tmp_path / "adapter", sites, SPEC).tree
        assert dtypes(tree) == {"float32"}
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float32)),
            tree,
            state.trained[kind],
        )
