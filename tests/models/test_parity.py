"""Logits equal transformers' for every family and feature, from a config.json alone."""

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.checkpoints.hf import Weights, load_params, open_weights, read_config
from ftjax.models.decoder import Decoder
from ftjax.models.registry import spec_from_config
from ftjax.models.spec import ModelSpec, Rope
from tests.goldens.weights import write_random

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens/parity.json").read_text())

# What a case is there for: without it, the logits must be far from the golden ones.
BITES: dict[str, dict[str, Any]] = {
    "llama_plain_untied": {"norm_eps": 1e-6},
    "llama_llama3_rope": {"rope": Rope(theta=500.0)},
    "llama_linear_rope": {"rope": Rope()},
    "llama_yarn_rope": {"rope": Rope(theta=100.0)},
    "llama_yarn_rope_settings": {"rope": Rope(theta=1000.0)},
    "mistral_window": {"windows": ()},
    "qwen2_upper_windows": {"windows": (6, 6)},
    "qwen2_layer_types": {"windows": (0, 6)},
    "qwen3_bias_windows": {"windows": ()},
    "smollm3_nope": {"rope_layers": ()},
    "smollm3_nope_windows": {"windows": (0, 5)},
}


def silent(_: str) -> None:
    """Takes the remarks that a case is expected to cause."""


def checkpoint(folder: Path, case: str) -> Weights:
    golden = GOLDEN["cases"][case]
    (folder / "config.json").write_text(json.dumps(golden["config"]))
    write_random(folder / "model.safetensors", golden["tensors"])
    config = read_config(folder)
    spec = spec_from_config(config, "config.json", note=silent)
    return open_weights(folder, spec, note=silent)


def logits(spec: ModelSpec, params: dict[str, Any], ids: list[int]) -> np.ndarray:
    tokens = jnp.asarray([ids], jnp.int32)
    positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
    model = jax.jit(partial(Decoder(spec).apply, method="logits"))
    return np.asarray(model({"params": params}, tokens, positions, tokens * 0 + 1))[0]


@cache
def expected(case: str) -> np.ndarray:
    return np.array(GOLDEN["cases"][case]["logits"])


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, case)
    params = load_params(weights, dtype="float32", note=silent)
    ours = logits(weights.spec, params, GOLDEN["ids"])
    assert np.abs(expected(case)).max() > 1
    np.testing.assert_allclose(ours, expected(case), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", BITES)
def test_the_feature_of_a_case_bites(case: str, tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, case)
    params = load_params(weights, dtype="float32", note=silent)
    other = replace(weights.spec, **BITES[case])
    assert other != weights.spec
    assert np.abs(logits(other, params, GOLDEN["ids"]) - expected(case)).max() > 1e-2


def test_a_real_pretrained_model(shared: Path) -> None:
    folder = shared / "models" / "stories260K"
    reference = json.loads((folder / "reference.json").read_text())
    spec = spec_from_config(read_config(folder), str(folder))
    params = load_params(open_weights(folder, spec), dtype="float32")
    ours = logits(spec, params, reference["prompt_ids"])[-1]
    wanted = np.array(reference["next_token_logits"])
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)
