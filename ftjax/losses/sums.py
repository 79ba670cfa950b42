"""What every loss returns: sums, which the step adds up and divides once."""

from typing import NamedTuple

import jax.numpy as jnp

from ftjax.weights import Array


class Term(NamedTuple):
    """A sum over tokens, sequences or pairs, and the weight that it is divided by."""

    sum: Array  # []
    weight: Array  # []


class Sums(NamedTuple):
    """Of the rows of one batch.

    Attributes:
      terms: of the loss, each a sum [] that a gradient flows through; what it is
        divided by is a matter of the data alone (see `step.Objective`).
      means: metrics.
      most: metrics that are the largest of something, [].
    """

    terms: dict[str, Array]
    means: dict[str, Term]
    most: dict[str, Array]

    def add(self, other: "Sums") -> "Sums":
        """Of both batches."""
        return Sums(
            {k: x + other.terms[k] for k, x in self.terms.items()},
            {
                k: Term(x.sum + other.means[k].sum, x.weight + other.means[k].weight)
                for k, x in self.means.items()
            },
            {k: jnp.maximum(x, other.most[k]) for k, x in self.most.items()},
        )

    def metrics(self) -> dict[str, Array]:
        """Every mean, and every largest value."""
        means = {k: x.sum / jnp.maximum(x.weight, 1e-30) for k, x in self.means.items()}
        return {**means, **self.most}
