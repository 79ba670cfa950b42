"""The order of rows as a pure function of the seed and the epoch."""

import numpy as np

_MASK = (1 << 64) - 1


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` rows in an epoch, int64 [count].

    Sorts the raw output of a Philox counter generator keyed by (seed, epoch). Only raw
    outputs are used: NumPy promises that those never change, while the results of its
    shuffling methods may change between versions.
    """
    key = np.array([seed & _MASK, epoch & _MASK], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")
