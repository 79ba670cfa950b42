"""Three steps of each optimizer are those of its formula, in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax.optim import make_optimizer
from ftjax.optimizers.muon import Matrices
from ftjax.optimizers.schedule_free import gradient_point
from ftjax.optimizers.settings import NAMES
from ftjax.weights import Delta
from tests.goldens.weights import random_tensor
from tests.models_small import optim_config

STEPS, LR, DECAY, WARMUP = 3, 0.02, 0.1, 2
RATES = [LR / 3, LR * 2 / 3, LR]
MATRICES: Matrices = {("layers", "out"): (1, 2)}
# Two layers of a projection [3, 4] -> [6], a table wide enough to factor, a norm.
SHAPES: dict[str, tuple[int, ...]] = {
    "w": (2, 3, 4, 6),
    "a": (2, 3, 4, 2),
    "b": (2, 2, 6),
    "embedding": (130, 128),
    "scale": (6,),
}

References = dict[str, Callable[..., np.ndarray]]


def tree(arrays: dict[str, Any]) -> Any:
    delta = Delta(arrays["a"], arrays["b"], jnp.full((2,), 2.0))
    return {
        "params": {
            "embed": {"embedding": arrays["embedding"]},
            "layers": {"out": {"w": arrays["w"]}},
            "norm": {"scale": arrays["scale"]},
        },
        "lora": {"layers": {"out": {"w": delta}}},
    }


def arrays(tree: Any) -> dict[str, np.ndarray]:
    delta = tree["lora"]["layers"]["out"]["w"]
    found = {
        "w": tree["params"]["layers"]["out"]["w"],
        "a": delta.a,
        "b": delta.b,
        "embedding": tree["params"]["embed"]["embedding"],
        "scale": tree["params"]["norm"]["scale"],
    }
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def numbers(kind: str) -> dict[str, np.ndarray]:
    return {n: random_tensor(f"{kind}.{n}", shape) for n, shape in SHAPES.items()}


def gradient(step: int) -> Any:
    return tree(numbers(f"gradient{step}"))


def run(config: Any, visit: Callable[[Any, Any], None] = lambda *_: None) -> Any:
    """The weights after three steps; `visit` sees weights and state after each."""
    tx = make_optimizer(config, 10, MATRICES)
    params = jax.tree.map(jnp.asarray, tree(numbers("weights")))
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(STEPS):
        grads = jax.tree.map(jnp.asarray, gradient(step))
        # A `Delta`'s scale is never trained: its gradient is zero.
        delta = grads["lora"]["layers"]["out"]["w"]
        grads["lora"]["layers"]["out"]["w"] = delta.replace(scale=0 * delta.scale)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        visit(params, state)
    return params


def matrix(name: str, x: np.ndarray) -> np.ndarray:
    """[layers, inputs, outputs] of a projection's weight or factor."""
    rows = {"w": 12, "a": 12, "b": 2}[name]
    return x.reshape(2, rows, -1)


def adam(
    name: str, w: Any, grads: Any, b1: float = 0.9, b2: float = 0.999
) -> np.ndarray:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (g, rate) in enumerate(zip(grads, RATES, strict=True), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        w = w - rate * (step + DECAY * (name != "scale") * w)
    return w


def lion(name: str, w: Any, grads: Any) -> np.ndarray:
    m = np.zeros_like(w)
    for g, rate in zip(grads, RATES, strict=True):
        step = np.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        w = w - rate * (step + DECAY * (name != "scale") * w)
    return w


def adafactor(name: str, w: Any, grads: Any) -> np.ndarray:
    v = rows = columns = np.float64(0)
    for t, (g, rate) in enumerate(zip(grads, RATES, strict=True), 1):
        keep, square = 1 - t**-0.8, g * g + 1e-30
        if name == "embedding":
            rows = keep * rows + (1 - keep) * square.mean(1, keepdims=True)
            columns = keep * columns + (1 - keep) * square.mean(0, keepdims=True)
            v = rows * columns / rows.mean()
        else:
            v = keep * v + (1 - keep) * square
        step = g / np.sqrt(v)
        step = step / max(1.0, float(np.sqrt((step**2).mean())))
        w = w - rate * (step + DECAY * (name != "scale") * w)
    return w


def orthogonal(x: np.ndarray) -> np.ndarray:
    """Five steps of the quintic iteration, of one matrix."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x.T if tall else x


def muon(name: str, w: Any, grads: Any) -> np.ndarray:
    if name in ("scale", "embedding"):
        return adam(name, w, grads, 0.95)
    m, b = np.zeros_like(w), 0.95
    for t, (g, rate) in enumerate(zip(grads, RATES, strict=True), 1):
        m = b * m + (1 - b) * g
        ahead = b * m / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b**t)
        layers = matrix(name, ahead)
        step = np.stack([orthogonal(layer) for layer in layers])
        step = 0.2 * np.sqrt(max(layers.shape[1:])) * step.reshape(w.shape)
        w = w - rate * (step + DECAY * w)
    return w


def averaged(name: str, w: Any, grads: Any) -> np.ndarray:
    x, z, v, total = w, w, np.zeros_like(w), 0.0
    for t, (g, rate) in enumerate(zip(grads, RATES, strict=True), 1):
        y = 0.1 * z + 0.9 * x
        v = 0.999 * v + 0.001 * g * g
        step = g / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        z = z - rate * (step + DECAY * (name != "scale") * y)
        total += rate**2
        share = rate**2 / total
        x = (1 - share) * x + share * z
    return x


REFERENCES: References = {
    "adamw": adam,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
    "schedule_free": averaged,
}


def config(name: str, **changes: Any) -> Any:
    values = {"weight_decay": DECAY, "lr": LR, "warmup": WARMUP, "clip_norm": 0.0}
    return optim_config(name=name, **(values | changes))


@pytest.mark.parametrize("name", REFERENCES)
def test_steps_are_those_of_the_formula(name: str) -> None:
    found = arrays(run(config(name)))
    start = arrays(tree(numbers("weights")))
    slopes = [arrays(gradient(step)) for step in range(STEPS)]
    for leaf, x in found.items():
        expected = REFERENCES[name](leaf, start[leaf], [s[leaf] for s in slopes])
        assert np.abs(expected - start[leaf]).max() > LR / 10
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=3e-6, err_msg=leaf)


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_is_never_trained(name: str) -> None:
    delta = run(config(name))["lora"]["layers"]["out"]["w"]
    np.testing.assert_array_equal(delta.scale, [2.0, 2.0])


@pytest.mark.parametrize("name", NAMES)
def test_lora_plus_multiplies_the_steps_of_b_alone(name: str) -> None:
    """By 16, a power of two, so exactly: rate and decay."""
    moved = []
    for ratio in (1.0, 16.0):
        tx = make_optimizer(config(name, b_lr_ratio=ratio), 10, MATRICES)
        start = numbers("weights") | {"b": np.zeros(SHAPES["b"], np.float32)}
        params = jax.tree.map(jnp.asarray, tree(start))
        grads = jax.tree.map(jnp.asarray, gradient(0))
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        moved.append(arrays(updates))
    plain, plus = moved
    for leaf in SHAPES:
        times = 16 if leaf == "b" else 1
        np.testing.assert_array_equal(plus[leaf], times * plain[leaf])
    assert np.abs(plain["b"]).min() > 0


def test_lora_plus_with_ratio_one_is_adamw_bit_for_bit() -> None:
    ours = run(config("adamw", weight_decay=0.0, warmup=0))
    tx = optax.adamw(LR, weight_decay=0.0)
    params = jax.tree.map(jnp.asarray, tree(numbers("weights")))
    state = tx.init(params)

    @jax.jit
    def update(*args: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(*args)

    for step in range(STEPS):
        updates, state = update(gradient(step), state, params)
        params = optax.apply_updates(params, updates)
    for leaf, x in arrays(ours).items():
        np.testing.assert_array_equal(x, arrays(params)[leaf])


def test_schedule_free_weights_are_the_mean_that_the_paper_defines() -> None:
    """x is the mean of all z, each with its rate squared; y lies between the two."""
    seen: list[tuple[Any, Any, Any]] = []

    def visit(params: Any, state: Any) -> None:
        y = gradient_point(state, params)
        seen.append((arrays(params), arrays(state.z), arrays(y)))

    run(config("schedule_free"), visit)
    for leaf in SHAPES:
        points = np.stack([z[leaf] for _, z, _ in seen])
        mean = np.average(points, axis=0, weights=np.square(RATES))
        x, z, y = (part[leaf] for part in seen[-1])
        np.testing.assert_allclose(x, mean, atol=1e-6)
        np.testing.assert_allclose(y, 0.9 * x + 0.1 * z, atol=1e-6)
        assert np.abs(x - z).max() > LR / 10


def test_schedule_free_is_that_of_optax_at_one_rate() -> None:
    ours = arrays(run(config("schedule_free", weight_decay=0.0, warmup=0)))
    tx = optax.contrib.schedule_free_adamw(LR)
    y = jax.tree.map(jnp.asarray, tree(numbers("weights")))
    state = tx.init(y)
    for step in range(STEPS):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(gradient(step), state, y)
        y = optax.apply_updates(y, updates)
    x = arrays(optax.contrib.schedule_free_eval_params(state, y))
    for leaf in SHAPES:
        np.testing.assert_allclose(ours[leaf], x[leaf], atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_moments_are_float32_or_codes_whatever_the_weights_are(name: str) -> None:
    tx = make_optimizer(config(name), 10, MATRICES)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), gradient(0))
    updates, state = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), half)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(state)}
    assert kinds <= {"float32", "int32", "uint8"}
    assert ("uint8" in kinds) == (name == "adamw8bit")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {"float32"}
