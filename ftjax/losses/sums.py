"""What every loss returns: sums, which the step adds up and divides once."""

from typing import Any, NamedTuple

import jax
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
      means: metrics; one without weight says nothing.
      most: metrics that are the largest of something, []; those whose names begin with
        a minus are the largest of what is negated: the smallest.
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

    def over(self, axis: str) -> "Sums":
        """Of all devices of a mapped axis."""
        terms, means = jax.lax.psum((self.terms, self.means), axis)
        return Sums(terms, means, jax.lax.pmax(self.most, axis))

    def metrics(self) -> dict[str, Array]:
        """Every mean (NaN where nothing has weight), and every extreme."""
        means = {k: x.sum / x.weight for k, x in self.means.items()}
        return means | extremes(self.most)


def extremes(most: dict[str, Any]) -> dict[str, Any]:
    """The largest and the smallest values, each under its own name."""
    return {k.lstrip("-"): -x if k[0] == "-" else x for k, x in most.items()}
