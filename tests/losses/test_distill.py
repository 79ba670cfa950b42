"""Distillation in chunks: the naive divergences and gradients, no [B, T, V] array."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.losses.distill import DIVERGENCES, Model, distill
from tests.losses.programs import sizes

B, T, V, BETA = 2, 7, 31, 0.3


def inputs(dtype: Any) -> tuple[Any, Any, Any]:
    """A student of width 5, a teacher of width 9, and weights with a row of none."""
    rng = np.random.default_rng(0)

    def model(width: int) -> Model:
        shapes = ((B, T, width), (width, V))
        return Model(*(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes))

    weights = jnp.asarray([[1, 0, 2, 0, 1, 1, 0], [0] * 7], jnp.float32)
    return model(5), model(9), weights


def naive(name: str, student: Model, teacher: Model, temperature: float) -> Any:
    s, t = (
        jax.nn.log_softmax(jnp.einsum("btd,dv->btv", *model) / temperature)
        for model in (student, teacher)
    )
    if name == "forward_kl":
        return jnp.sum(jnp.exp(t) * (t - s), -1)
    if name == "reverse_kl":
        return jnp.sum(jnp.exp(s) * (s - t), -1)
    m = jnp.log(BETA * jnp.exp(t) + (1 - BETA) * jnp.exp(s))
    of_teacher = jnp.sum(jnp.exp(t) * (t - m), -1)
    return BETA * of_teacher + (1 - BETA) * jnp.sum(jnp.exp(s) * (s - m), -1)


@pytest.mark.parametrize(
    ("name", "chunk", "temperature"),
    [("forward_kl", 2, 0.8), ("reverse_kl", 64, 1.0), ("js_divergence", 3, 2.0)],
)
def test_value_and_gradients_are_the_naive_ones(
    name: str, chunk: int, temperature: float
) -> None:
    with jax.enable_x64(True):
        student, teacher, w = inputs(jnp.float64)

        def chunked(student: Model) -> Any:
            found = distill(
                student,
                teacher,
                w,
                chunk,
                divergence=name,
                beta=BETA,
                temperature=temperature,
            )
            return jnp.sum(jnp.square(found.loss_BT)), found

        def plain(student: Model) -> Any:
            found = jnp.where(w != 0, naive(name, student, teacher, temperature), 0)
            return jnp.sum(jnp.square(found)), found

        (_, found), grads = jax.value_and_grad(chunked, has_aux=True)(student)
        (_, expected), wanted = jax.value_and_grad(plain, has_aux=True)(student)
        logits = np.einsum("btd,dv->btv", *map(np.asarray, student)) / temperature
    np.testing.assert_allclose(found.loss_BT, expected, atol=5e-6)
    for a, b in zip(grads, map(np.asarray, wanted), strict=True):
        assert np.abs(b).max() > 0.01
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = np.where(np.asarray(w) != 0, -(p * np.log(p)).sum(-1), 0)
    np.testing.assert_allclose(found.entropy_BT, entropy, atol=5e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name: str) -> None:
    _, teacher, w = inputs(jnp.float32)

    def total(student: Model) -> Any:
        found = distill(student, teacher, w, 4, divergence=name)
        return jnp.sum(found.loss_BT)

    value, grads = jax.value_and_grad(total)(teacher)
    assert abs(float(value)) < 1e-5
    for grad in grads:
        np.testing.assert_allclose(grad, 0, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_far_ends_are_finite_and_the_teacher_gets_no_gradient(name: str) -> None:
    student, teacher, w = inputs(jnp.float32)

    def total(student: Model, teacher: Model) -> Any:
        far = teacher._replace(hidden_BTD=1000 * teacher.hidden_BTD)
        found = distill(student, far, w, 4, divergence=name)
        return jnp.sum(found.loss_BT)

    value, (to_student, to_teacher) = jax.value_and_grad(total, (0, 1))(
        student, teacher
    )
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(grad)) for grad in to_student)
    for grad in to_teacher:
        np.testing.assert_array_equal(grad, 0)


def test_all_logits_are_never_made_nor_kept() -> None:
    student, teacher, w = inputs(jnp.float32)

    def largest(chunk: int) -> int:
        def total(student: Model) -> Any:
            found = distill(student, teacher, w, chunk, divergence="js_divergence")
            return jnp.sum(found.loss_BT)

        return max(sizes(jax.make_jaxpr(jax.grad(total))(student).jaxpr))[0]

    assert largest(10**6) >= B * T * V
    assert largest(2) < B * T * V
