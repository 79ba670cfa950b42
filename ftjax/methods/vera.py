"""VeRA: two trained vectors a projection, between frozen random matrices (2310.11454).

As PEFT defines it. The matrices are drawn from a key of their own, not from the seed of
the run: a checkpoint holds the vectors alone, and whoever opens it draws them again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from ftjax.errors import UserError
from ftjax.methods.parts import Method, Part, PyTree, Row
from ftjax.methods.patterns import each_matches, matches, patterns
from ftjax.methods.streams import stream
from ftjax.models.decoder import Decoder
from ftjax.models.proj import HEAD, Path, Site, put, site_names
from ftjax.models.vera import PAIR, Pair, Vera
from ftjax.sharding import replicated

LARGEST = 2**16  # of the rank: what is drawn must fit into memory


@dataclass(frozen=True)
class Target:
    """A site, and which of its layers have an update."""

    site: Site
    layers: tuple[bool, ...]


def plan_vera(model: Decoder, sites: Mapping[Path, Site], config: Any) -> Method:
    """Vectors beside the projections; `lambda_b` is zero: it begins as the base.

    Args:
      model: of any family.
      sites: its projections.
      config: `rank`, `targets` (as LoRA's), `d_initial` (where `lambda_d` begins),
        `dropout`, `projection_prng_key`.

    Raises:
      UserError: a pattern matches nothing, or a rank that is out of reach.
    """
    if config.rank > LARGEST:
        raise UserError(
            "the rank is larger than any weight",
            where="config.method.rank",
            expected=f"at most {LARGEST}",
            got=str(config.rank),
        )
    plan = targets(sites, config.targets)
    a, b = pair_shapes(plan, config.rank)

    def init(base: PyTree, seed: int) -> PyTree:
        return {"vera": start(plan, config)}

    def rest(base: PyTree) -> PyTree:
        pair = draw_pair(a, b, config.projection_prng_key)
        return {**base, "vera": {PAIR: _beside(base, pair)}}

    shapes, axes = jax.eval_shape(lambda: start(plan, config)), _axes(plan, config)
    key, whole = config.projection_prng_key, (None, None)
    pair = Part(
        {PAIR: Pair(_float(a), _float(b), key)},
        {PAIR: Pair(whole, whole, key)},  # type: ignore[arg-type]
    )
    parts, rows = {"vera": Part(shapes, axes)}, _rows(plan, config.rank)
    return Method("vera", parts, init, rest, rows, beside={"vera": pair})


def targets(sites: Mapping[Path, Site], text: str) -> dict[Path, Target]:
    """The projections that have an update."""
    body = {path: site for path, site in sites.items() if path != HEAD}
    names = [name for site in body.values() for name in site_names(site)]
    regexes = patterns(text, "config.method.targets")
    if text == "all-linear":
        regexes = [r".*"]
    each_matches(regexes, names, "config.method.targets")
    found = {}
    for path, site in body.items():
        hit = tuple(any(matches(p, n) for p in regexes) for n in site_names(site))
        if any(hit):
            found[path] = Target(site, hit)
    return found


def pair_shapes(
    plan: Mapping[Path, Target], rank: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of A and B: the widest inputs and outputs of all that are trained."""
    inputs = max(math.prod(at.site.inputs) for at in plan.values())
    outputs = max(math.prod(at.site.outputs) for at in plan.values())
    return (inputs, rank), (rank, outputs)


def draw_pair(a: tuple[int, int], b: tuple[int, int], key: int) -> Pair:
    """Kaiming uniform, as in PEFT: U(-x, x) with x = sqrt(6 / inputs) of each.

    The numbers are not PEFT's, which are torch's: they travel in the adapter's file.
    """

    def draw(name: str, shape: tuple[int, int]) -> jax.Array:
        values = stream(key, f"vera.{name}").uniform(-1, 1, shape)
        return jnp.asarray(values * math.sqrt(6 / shape[0]), jnp.float32)

    return Pair(draw("A", a), draw("B", b), key)


def start(plan: Mapping[Path, Target], config: Any) -> Any:
    """The trained part of the collection at the start."""
    tree: dict[str, Any] = {}
    for path, at in plan.items():
        live = jnp.asarray(at.layers, jnp.float32)[:, None]
        d = jnp.broadcast_to(live * config.d_initial, (len(at.layers), config.rank))
        b = jnp.zeros((len(at.layers), *at.site.outputs), jnp.float32)
        put(tree, path, {"w": Vera(d, b, at.site.inputs, config.dropout)})
    return tree


def _axes(plan: Mapping[Path, Target], config: Any) -> Any:
    tree: dict[str, Any] = {}
    for path, at in plan.items():
        b = (None, *at.site.axes[len(at.site.inputs) :])
        leaf = Vera((None, None), b, at.site.inputs, config.dropout)  # type: ignore
        put(tree, path, {"w": leaf})
    return tree


def _rows(plan: Mapping[Path, Target], rank: int) -> list[Row]:
    rows = []
    for path, at in plan.items():
        inputs, outputs = math.prod(at.site.inputs), math.prod(at.site.outputs)
        layers = sum(at.layers)
        count = layers * (rank + outputs)
        share, size = 100 * count / (layers * inputs * outputs), f"{inputs} x {outputs}"
        rows.append(Row(path[-1], size, str(rank), layers, count, share))
    return rows


def _beside(base: PyTree, pair: Pair) -> Pair:
    """The pair on the devices of the base."""
    place = jax.tree.leaves(base)[0].sharding
    if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh):
        return jax.device_put(pair, replicated(place.mesh))
    return pair


def _float(shape: tuple[int, ...]) -> Any:
    return jax.ShapeDtypeStruct(shape, "float32")
