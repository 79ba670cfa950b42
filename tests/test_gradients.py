"""Projections: the gradients written out are those that JAX derives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.gradients import project, project_updated
from ftjax.weights import Delta, low_rank

EQUATIONS: dict[str, dict[str, tuple[int, ...]]] = {
    "BTD,DNH->BTNH": {"x": (2, 5, 6), "w": (6, 3, 4)},
    "BTNH,NHD->BTD": {"x": (2, 5, 3, 4), "w": (3, 4, 6)},
    "BTD,DF->BTF": {"x": (2, 5, 6), "w": (6, 2)},
}
RANK, SCALE = 3, 1.7


def inputs(eqn: str) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    x, w = EQUATIONS[eqn]["x"], EQUATIONS[eqn]["w"]
    cut = len(x) - 2
    shapes = {"x": x, "w": w, "a": (*w[:cut], RANK), "b": (RANK, *w[cut:])}
    return {n: jnp.asarray(rng.standard_normal(s)) for n, s in shapes.items()}


def three_products(eqn: str, x: Any, w: Any, a: Any, b: Any) -> Any:
    down, up = low_rank(eqn)
    low = jnp.einsum(up, jnp.einsum(down, x, a), b)
    return jnp.einsum(eqn, x, w) + SCALE * low


@pytest.mark.parametrize("eqn", EQUATIONS)
def test_an_updated_projection_and_every_gradient(eqn: str) -> None:
    with jax.enable_x64(True):
        values = inputs(eqn)

        def loss(method: Any) -> Any:
            return lambda *args: jnp.sum(jnp.sin(method(eqn, *args)))

        def folded(eqn: str, x: Any, w: Any, a: Any, b: Any) -> Any:
            return project_updated(eqn, x, w, a, b, jnp.asarray(SCALE))

        order = tuple(values[name] for name in ("x", "w", "a", "b"))
        for wanted in [(0, 1, 2, 3), (0, 2, 3), (2, 3), (0,), (1,)]:
            found = jax.value_and_grad(loss(folded), wanted)(*order)
            plain = jax.value_and_grad(loss(three_products), wanted)(*order)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
                found,
                plain,
            )


@pytest.mark.parametrize("eqn", EQUATIONS)
def test_a_projection_and_its_gradients(eqn: str) -> None:
    with jax.enable_x64(True):
        values = inputs(eqn)
        order = (values["x"], values["w"])
        for wanted in [(0, 1), (0,), (1,)]:
            found, plain = (
                jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(eqn, *a))), wanted)(*order)
                for f in (project, jnp.einsum)
            )
            for a, b in zip(found, plain, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_zero_b_is_the_base_bit_for_bit() -> None:
    values = {n: v.astype(jnp.float32) for n, v in inputs("BTD,DF->BTF").items()}
    delta = Delta(values["a"], jnp.zeros_like(values["b"]), jnp.float32(SCALE))
    found = delta.folded("BTD,DF->BTF", values["x"], values["w"])
    base = project("BTD,DF->BTF", values["x"], values["w"])
    np.testing.assert_array_equal(found, base)


def test_a_frozen_weight_gets_no_gradient_of_its_size() -> None:
    values = inputs("BTD,DNH->BTNH")
    delta = Delta(values["a"], values["b"], jnp.float32(SCALE))

    def loss(delta: Any) -> Any:
        return jnp.sum(delta.folded("BTD,DNH->BTNH", values["x"], values["w"]) ** 2)

    text = str(jax.make_jaxpr(jax.grad(loss))(delta))
    # Only the update itself, a.b, has the size of the weight: once in each pass.
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert sum(":f32[6,12]" in line for line in products) == 2


def test_runs_beside_each_other() -> None:
    values = {n: v.astype(jnp.float32) for n, v in inputs("BTD,DF->BTF").items()}
    many = jnp.stack([values["a"], -values["a"]])

    def loss(a: Any) -> Any:
        delta = Delta(a, values["b"], jnp.float32(SCALE))
        return jnp.sum(delta.folded("BTD,DF->BTF", values["x"], values["w"]) ** 2)

    found = jax.vmap(jax.grad(loss))(many)
    for a, one in zip(many, found, strict=True):
        np.testing.assert_allclose(one, jax.grad(loss)(a), rtol=2e-5, atol=2e-5)
