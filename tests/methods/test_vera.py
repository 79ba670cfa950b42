"""VeRA: a pair that one key draws, sliced for every site, and layers left alone."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from ftjax.errors import UserError
from ftjax.methods.method import plan_method
from ftjax.models.decoder import Decoder
from ftjax.models.vera import PAIR, as_lora
from ftjax.weights import join
from tests.models_small import SPEC, moved, small_model

MODEL = Decoder(SPEC)


def vera(**changes: Any) -> Any:
    values = {"name": "vera", "rank": 6, "targets": "all-linear", "d_initial": 0.1}
    more = {"dropout": 0.0, "projection_prng_key": 0, "also_train": ""}
    return plan_method(MODEL, SimpleNamespace(**{**values, **more, **changes}))


def whole(seed: int = 0, **changes: Any) -> Any:
    trained, frozen = vera(**changes).start({"params": small_model()[1]}, seed)
    return join(frozen, trained)["vera"]


def test_a_key_draws_the_pair_and_the_seed_does_not() -> None:
    first, other, third = whole(0), whole(1), whole(projection_prng_key=1)
    np.testing.assert_array_equal(first[PAIR].a, other[PAIR].a)
    assert np.abs(np.asarray(first[PAIR].a - third[PAIR].a)).max() > 0.1
    assert first[PAIR].a.shape == (48, 6) and first[PAIR].b.shape == (6, 48)
    for x, inputs in ((first[PAIR].a, 48), (first[PAIR].b, 6)):
        most = np.sqrt(6 / inputs)
        assert 0.9 * most < np.abs(np.asarray(x)).max() <= most


def test_every_site_takes_its_part_of_the_pair() -> None:
    collection = jax.tree.map(moved, whole())
    pair, layers = collection[PAIR], collection["layers"]
    leaf = layers["self_attn"]["o_proj"]["w"]
    found = as_lora(collection)["layers"]["self_attn"]["o_proj"]["w"].dense()[1]
    a_Ir, b_rO = np.asarray(pair.a)[:32], np.asarray(pair.b)[:, :32]
    d, b = np.asarray(leaf.lambda_d)[1], np.asarray(leaf.lambda_b)[1]
    wanted = (a_Ir * d) @ b_rO * b
    np.testing.assert_allclose(found.reshape(32, 32), wanted, atol=1e-5)


def test_a_layer_that_is_no_target_has_no_gradient() -> None:
    method = vera(targets=r"layers\.1\.self_attn\.q_proj")
    params = small_model()[1]
    trained, frozen = method.start({"params": params}, 0)
    tokens = np.arange(8)[None]
    rows = (tokens, tokens, np.ones_like(tokens))

    def loss(trained: Any) -> Any:
        return MODEL.apply(join(frozen, trained), *rows).sum()

    leaf = jax.grad(loss)(trained)["vera"]["layers"]["self_attn"]["q_proj"]["w"]
    assert not np.asarray(leaf.lambda_b)[0].any()
    assert np.asarray(leaf.lambda_b)[1].any()
    assert method.count == 6 + 32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": "q_projj"}, "matches no"),
        ({"targets": "lm_head"}, "matches no"),
        ({"rank": 2**17}, "larger than any weight"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        vera(**changes)
