"""Float64 formulas and finite differences: what the losses are held against."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Doubles = np.ndarray[Any, np.dtype[np.float64]]


def sigmoid(x: Any) -> Any:
    return np.exp(log_sigmoid(x))


def log_sigmoid(x: Any) -> Any:
    return -np.logaddexp(0, -np.asarray(x, np.float64))


def slopes(f: Callable[..., Any], args: list[Doubles]) -> list[Doubles]:
    """The gradient of sum(f(*args)) for each argument, by central differences."""
    found = []
    for place, arg in enumerate(args):
        slope = np.zeros(arg.shape)
        for index in np.ndindex(*arg.shape):
            step = 1e-5 * max(1.0, abs(float(arg[index])))
            ends = []
            for sign in (1, -1):
                moved = [a.copy() for a in args]
                moved[place][index] += sign * step
                ends.append(np.sum(f(*moved)))
            slope[index] = (ends[0] - ends[1]) / (2 * step)
        found.append(slope)
    return found


def agree(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    args: list[Doubles],
    rtol: float = 2e-4,
) -> None:
    """Holds a float32 loss and its gradient against a float64 formula."""
    small = [jnp.asarray(a, jnp.float32) for a in args]
    places = tuple(range(len(args)))

    def total(*args: Any) -> Any:
        loss = ours(*args)
        return jnp.sum(loss), loss

    (_, loss), grads = jax.value_and_grad(total, places, has_aux=True)(*small)
    expected = reference(*args)
    assert loss.dtype == jnp.float32 and loss.shape == np.shape(expected)
    np.testing.assert_allclose(loss, expected, rtol=rtol, atol=1e-5)
    for place, (a, b) in enumerate(zip(grads, slopes(reference, args), strict=True)):
        np.testing.assert_allclose(
            a, b, rtol=rtol, atol=1e-5, err_msg=f"argument {place}"
        )


def all_finite(f: Callable[..., Any], *args: Any) -> None:
    """Asserts that a loss and its gradients are finite at these arguments."""
    small = [jnp.asarray(a, jnp.float32) for a in args]
    places = tuple(range(len(args)))
    grads = jax.grad(lambda *a: jnp.sum(f(*a)), places)(*small)
    for found in (f(*small), *grads):
        assert np.all(np.isfinite(found)), (args, found)
