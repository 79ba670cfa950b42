"""The values that codes stand for: bitsandbytes' tables, exactly.

`NF4` and `FP4` are indexed by the 4-bit code, `DYNAMIC` and `UNSIGNED` by the 8-bit
one.
"""

import numpy as np

# The quantiles of N(0, 1) scaled to [-1, 1], with an exact zero (arXiv 2305.14314).
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)

# A sign, two bits of exponent, one of mantissa; not the E2M1 of the OCP standard, whose
# smallest number is sixteen times as large.
_POSITIVE = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32)
FP4 = np.concatenate([_POSITIVE, 0 - _POSITIVE]) / np.float32(12)

# From the lowest value to the highest; of the two zeros the positive one comes first.
FP4_ORDER = np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8)


def _dynamic_map(signed: bool) -> np.ndarray:
    """8-bit numbers with a dynamic exponent (arXiv 1511.04561): 256, sorted.

    Without a sign, its bit goes to the fraction.
    """
    parts = [np.array([0, 1], np.float32)]
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        edges = _linspace(np.float32(0.1), np.float32(1), count + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        positive = np.float32(10.0 ** (exponent - 6)) * means
        parts += [positive, -positive] if signed else [positive]
    return np.sort(np.concatenate(parts))


def _linspace(start: np.float32, end: np.float32, count: int) -> np.ndarray:
    """From both ends to the middle with one float32 step, as torch does, to the bit."""
    step, index = float((end - start) / np.float32(count - 1)), np.arange(count)
    up, down = float(start) + step * index, float(end) - step * (count - 1 - index)
    return np.where(index < count // 2, up, down).astype(np.float32)


DYNAMIC = _dynamic_map(signed=True)
UNSIGNED = _dynamic_map(signed=False)


def ascending(format_name: str) -> tuple[np.ndarray, np.ndarray]:
    """(midpoints [15] between neighbouring values, codes [16] in the order of values).

    A value at a midpoint belongs to the lower neighbour.
    """
    order = np.arange(16, dtype=np.uint8) if format_name == "nf4" else FP4_ORDER
    values = table(format_name)[order]
    return (values[:-1] + values[1:]) / np.float32(2), order


def table(format_name: str) -> np.ndarray:
    """What the sixteen codes of 'nf4' or 'fp4' stand for, float32."""
    return NF4 if format_name == "nf4" else FP4
