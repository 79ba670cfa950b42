"""Random numbers by name, so that a start does not depend on what else is trained."""

import numpy as np


def stream(seed: int, name: str) -> np.random.Generator:
    """Random numbers that depend on seed and name alone, on any platform."""
    words = [seed, *np.frombuffer(name.encode(), np.uint8).tolist()]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
