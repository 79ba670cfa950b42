"""Virtual tokens: the same before a document alone, in a packed row and in a cache."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.errors import UserError
from ftjax.methods.method import plan_method
from ftjax.methods.virtual import begin_with
from ftjax.models.cached import cached_logits, init_cache, split_layers
from ftjax.models.decoder import Decoder
from tests.models_small import SPEC, small_params

N = 3
# A window that ends inside the rows below, and a layer without rotation.
WINDOWED = replace(SPEC, windows=(5, 0), rope_layers=(True, False))
DOCS = ([5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23])
KINDS = ("prompt", "prefix")


def variables(kind: str) -> Any:
    config = SimpleNamespace(name=kind, tokens=N, std=1.0)
    method = plan_method(Decoder(WINDOWED), config)
    trained, frozen = method.start({"params": small_params()}, 0)
    grown = jax.tree.map(lambda x: x * (10 if kind == "prompt" else 1), trained)
    return {**frozen, **grown}


def logits(tree: Any, tokens: Any, positions: Any, segments: Any) -> np.ndarray:
    rows = (jnp.asarray([x], jnp.int32) for x in (tokens, positions, segments))
    return np.asarray(Decoder(WINDOWED).apply(tree, *rows, method="logits")[0])


def alone(tree: Any, doc: list[int]) -> np.ndarray:
    return logits(tree, doc, range(len(doc)), [1] * len(doc))


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_document_is_as_if_it_were_alone(kind: str) -> None:
    tree = variables(kind)
    a, b = DOCS
    packed = logits(
        tree,
        [*a, *b, 0, 0],
        [*range(len(a)), *range(len(b)), 0, 0],
        [1] * len(a) + [2] * len(b) + [0, 0],
    )
    wanted = np.concatenate([alone(tree, a), alone(tree, b)])
    np.testing.assert_allclose(packed[: len(wanted)], wanted, atol=2e-5)
    plain = alone({"params": tree["params"]}, a)
    assert np.abs(wanted[: len(a)] - plain).max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_gives_the_logits_of_the_whole_row(kind: str) -> None:
    """Two prompts of unequal length, padded on the left, then token by token."""
    tree = variables(kind)
    weights = split_layers(tree, jnp.float32)
    width = 4
    starts = jnp.asarray([0, 2], jnp.int32)
    rows = np.zeros((2, len(DOCS[0])), np.int32)
    rows[0], rows[1, 2:6] = DOCS[0], DOCS[1]
    cache = init_cache(WINDOWED, 2, 8, jnp.float32, weights)
    wanted = [alone(tree, doc) for doc in DOCS]
    slot, step = 0, rows[:, :width]
    while slot < 6:
        last, cache = cached_logits(
            WINDOWED, weights, jnp.asarray(step), jnp.asarray(slot), starts, cache
        )
        slot += step.shape[1]
        for row, start in enumerate((0, 2)):
            at = wanted[row][slot - start - 1]
            np.testing.assert_allclose(last[row], at, atol=2e-5)
        step = rows[:, slot : slot + 1]


def test_a_prompt_of_embeddings_is_those_tokens() -> None:
    config = SimpleNamespace(name="prompt", tokens=N)
    method = begin_with(plan_method(Decoder(WINDOWED), config), [7, 8])
    trained, frozen = method.start({"params": small_params()}, 0)
    tree = {**frozen, **trained}
    found, wanted = alone(tree, DOCS[0]), alone(frozen, [7, 8, 7, *DOCS[0]])
    np.testing.assert_allclose(found, wanted[N:], atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_they_must_leave_room(kind: str) -> None:
    config = SimpleNamespace(name=kind, tokens=SPEC.max_positions, std=1.0)
    with pytest.raises(UserError, match="fill the model's context"):
        plan_method(Decoder(SPEC), config)
