"""Weights of the small model."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from ftjax.models.decoder import Decoder
from tests.decoding.small import SPEC


@pytest.fixture(scope="package")
def params() -> Any:
    tokens = jnp.zeros((1, 1), jnp.int32)
    made = Decoder(SPEC).init(jax.random.key(1), *[tokens] * 3, method="logits")
    # Untied from the small start, so that the likeliest token varies.
    return jax.tree.map(lambda w: w * 2 if w.ndim > 2 else w, nn.unbox(made)["params"])
