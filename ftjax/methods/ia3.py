"""(IA)^3: learned factors on keys, values and the MLP's hidden input (2205.05638).

As PEFT defines it: a projection's outputs, its bias included, are multiplied by a
vector, or, where it is named as feed-forward, its inputs are. Both go into the weights
when merged.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftjax.errors import UserError
from ftjax.methods.parts import Method, Part, PyTree, Row
from ftjax.methods.patterns import each_matches, matches, patterns, split_list
from ftjax.models.decoder import Decoder
from ftjax.models.proj import HEAD, INPUTS, OUTPUTS, Path, Site, put, site_names


class Factor(NamedTuple):
    """A projection and the side of it that is multiplied: INPUTS or OUTPUTS."""

    site: Site
    side: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one layer."""
        return self.site.inputs if self.side == INPUTS else self.site.outputs

    @property
    def axes(self) -> tuple[str | None, ...]:
        cut = len(self.site.inputs)
        at = slice(0, cut) if self.side == INPUTS else slice(cut, None)
        return (None, *self.site.axes[at])


def plan_ia3(model: Decoder, sites: Mapping[Path, Site], config: Any) -> Method:
    """Factors that start at one, so that the model begins as its base.

    Args:
      model: of any family.
      sites: its projections.
      config: `targets` ('all-linear', or regexes as LoRA's) and `feedforward`, regexes:
        which of the targets have their inputs multiplied.

    Raises:
      UserError: a pattern matches nothing, or some layers of a stack only.
    """
    plan = factors(sites, config.targets, config.feedforward)

    def init(base: PyTree, seed: int) -> PyTree:
        return {"ia3": ones(plan)}

    axes: dict[str, Any] = {}
    rows = []
    for path, factor in plan.items():
        put(axes, (*path, factor.side), factor.axes)
        inputs, outputs = math.prod(factor.site.inputs), math.prod(factor.site.outputs)
        layers = factor.site.layers or 1
        count = layers * math.prod(factor.shape)
        size, share = f"{inputs} x {outputs}", 100 * count / (layers * inputs * outputs)
        rows.append(Row(f"{path[-1]}, {factor.side}", size, "", layers, count, share))
    part = Part(jax.eval_shape(lambda: ones(plan)), axes)
    return Method("ia3", {"ia3": part}, init, rows=rows)


def ones(plan: Mapping[Path, Factor]) -> Any:
    """The collection at the start."""
    tree: dict[str, Any] = {}
    for path, factor in plan.items():
        shape = (factor.site.layers or 1, *factor.shape)
        put(tree, (*path, factor.side), jnp.ones(shape, jnp.float32))
    return tree


def factors(
    sites: Mapping[Path, Site], targets: str, feedforward: str
) -> dict[Path, Factor]:
    """The projections that are multiplied, and on which side."""
    body = {path: site for path, site in sites.items() if path != HEAD}
    names = [name for site in body.values() for name in site_names(site)]
    regexes = patterns(targets, "config.method.targets")
    if targets == "all-linear":
        regexes = [r".*"]
    inner = split_list(feedforward)
    each_matches(regexes, names, "config.method.targets")
    each_matches(inner, names, "config.method.feedforward")
    found = {}
    for path, site in body.items():
        hit = _whole(regexes, site, "config.method.targets")
        fed = _whole(inner, site, "config.method.feedforward")
        if fed and not hit:
            raise UserError(
                "what is feed-forward must be a target too",
                where="config.method.feedforward",
                expected=f"only names that targets={targets} matches",
                got=path[-1],
            )
        if hit:
            found[path] = Factor(site, INPUTS if fed else OUTPUTS)
    return found


def _whole(regexes: list[str], site: Site, key: str) -> bool:
    """Whether all layers of a site match; or none does."""
    hit = [any(matches(p, name) for p in regexes) for name in site_names(site)]
    if any(hit) and not all(hit):
        raise UserError(
            "the layers of a stack would be multiplied in different ways",
            where=key,
            expected=f"every layer's {site.path[-1]}, or none",
            got="layers " + ", ".join(str(i) for i, h in enumerate(hit) if h),
            fix="write patterns that do not depend on the layer",
        )
    return all(hit)


def merge_ia3(params: Any, ia3: Any) -> Any:
    """`params` with every factor in its weight and bias, in float32, cast back last."""

    def scale(tree: Any, update: Any) -> Any:
        if INPUTS in update:
            return {**tree, "w": _times(tree["w"], update[INPUTS], left=True)}
        if OUTPUTS in update:
            return {
                name: _times(leaf, update[OUTPUTS], left=False)
                for name, leaf in tree.items()
            }
        return {k: scale(v, update[k]) if k in update else v for k, v in tree.items()}

    return scale(params, ia3)


def _times(w: jax.Array, factor: jax.Array, *, left: bool) -> jax.Array:
    """w [L, *inputs, *outputs] times [L, *inputs] from the left, or [L, *outputs]."""
    layers, *rest = factor.shape
    gap = [1] * (w.ndim - factor.ndim)
    shape = (layers, *rest, *gap) if left else (layers, *gap, *rest)
    factor = factor.reshape(shape).astype(jnp.float32)
    return (w.astype(jnp.float32) * factor).astype(w.dtype)
