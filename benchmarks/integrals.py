"""The exact error of a format on weights from N(0, 1): integrals, in float64.

A block of n weights is scaled by its largest magnitude m, which has the density
2 n phi(m) (2 Phi(m) - 1)^(n - 1) and is stored without error; the others are normal
numbers within [-m, m], independent of one another. Affine codes are scaled by the range
[a, b], smallest to largest: density n (n - 1) phi(a) phi(b) (Phi(b) - Phi(a))^(n - 2),
the others within [a, b]. Within a block the error is a sum over codes of moments of the
normal distribution in closed form, so one numerical integral is left, over m, or two,
over a and b.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from ftjax.quant.codebooks import table
from ftjax.quant.formats import Format

HIGHEST = 9.0  # P(|x| > 9) is 1e-19
POINTS = 2000
POINTS_2D = 160  # for each of a and b
NEGLIGIBLE = 1e-7  # of the largest density
AT_ONCE = 500  # blocks: codes x blocks x 8 bytes


class Error(NamedTuple):
    """Mean absolute and mean squared error, in standard deviations of the weights."""

    mae: float
    mse: float


def expected_error(fmt: Format, inputs: int) -> Error:
    """Of weights with so many inputs; the blocks must be full.

    Double quantization is left out: it changes less than a thousandth.

    >>> round(expected_error(Format('nf4', 64), 64).mae, 4)
    0.0728
    """
    size = fmt.group or inputs
    found = _affine(fmt, size) if fmt.affine else _symmetric(fmt, size)
    return Error(*map(float, found))


def _symmetric(fmt: Format, size: int) -> np.ndarray:
    m = np.linspace(0, HIGHEST, POINTS + 1)[1:]
    inside = 2 * ndtr(m) - 1
    density = 2 * size * _phi(m) * inside ** (size - 1)
    values = m[:, None] * _levels(fmt)
    others = _errors(values, -m, m) / inside
    return (size - 1) / size * _mean(others, density)


def _affine(fmt: Format, size: int) -> np.ndarray:
    """Zero points are integers, so the extremes are not stored exactly either."""
    edge = np.linspace(0, HIGHEST, 2 * POINTS_2D + 1)[1::2]
    low, high = (x.reshape(-1) for x in np.meshgrid(-edge, edge))
    inside = ndtr(high) - ndtr(low)
    # In logarithms, since the power underflows.
    log = np.log(_phi(low)) + np.log(_phi(high)) + (size - 2) * np.log(inside)
    density = np.exp(log - log.max())
    keep = density > NEGLIGIBLE
    low, high = low[keep], high[keep]
    parts = [
        _affine_blocks(
            low[i : i + AT_ONCE], high[i : i + AT_ONCE], 2**fmt.bits - 1, size
        )
        for i in range(0, low.size, AT_ONCE)
    ]
    return _mean(np.concatenate(parts, axis=1), density[keep])


def _affine_blocks(
    low: np.ndarray, high: np.ndarray, most: int, size: int
) -> np.ndarray:
    """[mae, mse] of blocks with these extremes: [2, blocks]."""
    step = (high - low) / most
    zero = np.clip(np.round(-low / step), 0, most)
    values = (np.arange(most + 1) - zero[:, None]) * step[:, None]
    others = _errors(values, low, high) / (ndtr(high) - ndtr(low))
    ends = sum(
        np.abs(x - (np.clip(np.round(x / step) + zero, 0, most) - zero) * step)
        ** np.array([[1], [2]])
        for x in (low, high)
    )
    return ((size - 2) * others + ends) / size


def _levels(fmt: Format) -> np.ndarray:
    """The values of all codes, ascending, for a block whose largest magnitude is 1."""
    if fmt.is_table:
        return np.unique(table(fmt.name).astype(np.float64))
    most = 2 ** (fmt.bits - 1) - 1
    return np.arange(-most, most + 1) / most


def _errors(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Integrals of |x - v(x)| phi(x) and of its square over [low, high]: [2, blocks].

    Args:
      values: [blocks, codes], ascending; v(x) is the nearest.
      low, high: [blocks].
    """
    middle = (values[:, 1:] + values[:, :-1]) / 2
    low, high = low[:, None], high[:, None]
    edges = np.clip(np.concatenate([low, middle, high], axis=1), low, high)
    left, right = edges[:, :-1], edges[:, 1:]
    centre = np.clip(values, left, right)
    zero, first, second = _moments(left, right)
    zero_l, first_l, _ = _moments(left, centre)
    below = values * zero_l - first_l
    above = (first - first_l) - values * (zero - zero_l)
    square = second - 2 * values * first + values**2 * zero
    return np.stack([(below + above).sum(1), square.sum(1)])


def _moments(
    left: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integrals of phi, x phi and x^2 phi over [left, right]."""
    zero = ndtr(right) - ndtr(left)
    first = _phi(left) - _phi(right)
    second = zero + left * _phi(left) - right * _phi(right)
    return zero, first, second


def _phi(x: np.ndarray) -> np.ndarray:
    return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


def _mean(values: np.ndarray, density: np.ndarray) -> np.ndarray:
    """Over equally spaced points, so the spacing cancels."""
    return (values * density).sum(1) / density.sum()
