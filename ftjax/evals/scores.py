"""What a reward model thinks of every row of a data set."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ftjax.data.loader import Loader
from ftjax.models.decoder import Decoder
from ftjax.objectives.reward import scores
from ftjax.sharding import batch_sharding, put_batch

PyTree = Any


def score_rows(
    model: Decoder, variables: PyTree, loader: Loader, mesh: Mesh, rows: int
) -> list[dict[str, Any]]:
    """Of each row of the source, in its order: `where`, and `score` or both of a pair.

    Args:
      model: of the policy.
      variables: with the head of a reward model.
      loader: of rows that hold the last token of each example.
      mesh: of the variables.
      rows: of a batch.
    """
    members, data = loader.dataset.members, loader.dataset

    @jax.jit
    def score(variables: PyTree, batch: PyTree) -> jax.Array:
        return scores(model, variables, batch, members)

    found: dict[int, dict[str, Any]] = {}
    for batch, groups in loader.epoch_groups(rows):
        each_MBU = np.asarray(score(variables, put_batch(batch, batch_sharding(mesh))))
        for row, numbers in enumerate(groups):
            for place, group in enumerate(numbers):
                own = data.groups[group]
                values = each_MBU[: len(own), row, place].tolist()
                names = ("chosen", "rejected") if len(own) == 2 else ("score",)
                where = data.examples[own[0]].where
                given = dict(zip(names, values, strict=True))
                found[group] = {"where": where, **given}
    return [found[group] for group in sorted(found)]
