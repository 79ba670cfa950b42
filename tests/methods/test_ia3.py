"""(IA)^3: factors go into weights and biases."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from ftjax.errors import UserError
from ftjax.methods.ia3 import merge_ia3
from ftjax.methods.method import plan_method
from ftjax.models.decoder import Decoder
from ftjax.models.proj import init_params
from tests.models_small import SPEC, small_batch

BIASED = Decoder(replace(SPEC, qkv_bias=True, o_bias=True, mlp_bias=True))


def ia3_config(**changes: Any) -> SimpleNamespace:
    values = {"targets": "k_proj,v_proj,down_proj", "feedforward": "down_proj"}
    return SimpleNamespace(**{"name": "ia3", **values, **changes})


def moved(tree: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), tree
    )


def logits(variables: Any) -> np.ndarray:
    batch = small_batch(rows=2)
    rows = (batch["tokens"], batch["positions"], batch["segments"])
    return np.asarray(BIASED.apply(variables, *rows, method="logits"))


def test_merged_equals_unmerged_with_biases() -> None:
    params = moved(jax.jit(partial(init_params, BIASED))(jax.random.key(0)))
    config = ia3_config(targets=".*_proj", feedforward="[od].*_proj")
    trained, frozen = plan_method(BIASED, config).start({"params": params}, 0)
    trained = moved(trained)
    found = logits({**frozen, **trained})
    assert np.abs(found - logits(frozen)).max() > 0.1
    np.testing.assert_allclose(
        logits({"params": merge_ia3(params, trained["ia3"])}), found, atol=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": "q_projj"}, "matches no"),
        ({"feedforward": "up_proj"}, "must be a target too"),
        ({"targets": "layers.1.self_attn.k_proj", "feedforward": ""}, "different ways"),
        ({"targets": ""}, "nothing to train"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_method(BIASED, ia3_config(**changes))
