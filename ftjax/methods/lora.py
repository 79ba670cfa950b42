"""LoRA as PEFT defines it, as a loop over the projection sites.

A plan says, for each site and layer, which rank and which alpha; everything else (the
tree, the table, merging, export) follows from the plan and the sites.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import UserError
from ftjax.methods.patterns import each_matches, first, matches, pairs, patterns
from ftjax.methods.streams import stream
from ftjax.models.proj import HEAD, Path, Site, put, site_names
from ftjax.weights import Delta


@dataclass(frozen=True)
class SitePlan:
    """The update of one site: rank and alpha per layer; rank 0 where there is none."""

    site: Site
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    rslora: bool = False
    dora: bool = False

    @property
    def rank(self) -> int:
        """The stored rank: that of the largest layer."""
        return max(self.ranks)

    @property
    def scales(self) -> tuple[float, ...]:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        root = math.sqrt if self.rslora else float
        pairs = zip(self.alphas, self.ranks, strict=True)
        return tuple(alpha / root(rank) if rank else 0.0 for alpha, rank in pairs)

    @property
    def count(self) -> int:
        """Trained parameters: rank * (inputs + outputs), summed over the layers.

        And as many as there are outputs in each of them that has a magnitude.
        """
        inputs, outputs = math.prod(self.site.inputs), math.prod(self.site.outputs)
        lengths = outputs * sum(rank > 0 for rank in self.ranks) if self.dora else 0
        return sum(self.ranks) * (inputs + outputs) + lengths


@dataclass(frozen=True)
class LoraPlan:
    sites: dict[Path, SitePlan]
    dropout: float = 0.0


def plan_lora(sites: Mapping[Path, Site], config: Any) -> LoraPlan:
    """Resolves targets and patterns against the sites of a model.

    Args:
      sites: of the model.
      config: `targets` ('all-linear', or regexes separated by commas, each matched
        against whole module names or their dotted suffixes, as PEFT does), `rank`,
        `alpha`, `rank_pattern` and `alpha_pattern` ('regex=value,...', the first that
        matches a name's end wins), `use_rslora`, `use_dora`, `dropout`.

    Raises:
      UserError: where a pattern matches nothing, is no regex or names the head, or a
        rank does not fit its weight.
    """
    body = {path: site for path, site in sites.items() if path != HEAD}
    everything = [name for site in sites.values() for name in site_names(site)]
    regexes = patterns(config.targets, "config.method.targets")
    if config.targets == "all-linear":
        regexes = [r".*"]
    each_matches(regexes, everything, "config.method.targets")
    _refuse_head(regexes, config.targets, sites)
    ranks = pairs(config.rank_pattern, "config.method.rank_pattern", int)
    alphas = pairs(config.alpha_pattern, "config.method.alpha_pattern", float)
    for values, key in ((ranks, "rank_pattern"), (alphas, "alpha_pattern")):
        each_matches(list(values), everything, f"config.method.{key}")
    plans = {}
    # A run that was saved before there was DoRA does not name it.
    kinds = (config.use_rslora, getattr(config, "use_dora", False))
    for path, site in body.items():
        names = site_names(site)
        hit = [any(matches(p, name) for p in regexes) for name in names]
        if any(hit):
            rank = [
                first(ranks, n, config.rank) if h else 0
                for n, h in zip(names, hit, strict=True)
            ]
            alpha = [first(alphas, name, config.alpha) for name in names]
            _check_rank(site, max(rank))
            plans[path] = SitePlan(site, tuple(rank), tuple(alpha), *kinds)
    return LoraPlan(plans, config.dropout)


def _refuse_head(regexes: list[str], targets: str, sites: Mapping[Path, Site]) -> None:
    named = any(matches(p, "lm_head") for p in regexes)
    if named and targets != "all-linear" and HEAD in sites:
        raise UserError(
            "the output head cannot be a LoRA target",
            where="config.method.targets",
            expected="projections inside the layers",
            got=targets,
            fix="leave lm_head out, or use method=full",
        )


def _check_rank(site: Site, rank: int) -> None:
    most = min(math.prod(site.inputs), math.prod(site.outputs))
    if rank > most:
        raise UserError(
            "the rank is larger than the weight",
            where=f"config.method.rank for {'.'.join(site.path)}",
            expected=f"at most {most}: the weight is {math.prod(site.inputs)} x "
            f"{math.prod(site.outputs)}",
            got=str(rank),
        )


def init_lora(plan: LoraPlan, seed: int, init: str = "kaiming") -> Any:
    """The collection at the start: `b` is zero, so the model begins as the base.

    `a` is U(-1/sqrt(inputs), 1/sqrt(inputs)) (PEFT's kaiming_uniform(sqrt 5)) or, for
    'gaussian', N(0, 1/rank^2); what is made of the weights ('pissa', 'olora', 'loftq')
    is put over this. For 'a_zero' it is `a` that is zero, and `b` what PEFT's draw
    gives for it: its inputs are the rank, so U(-1/sqrt(rank), 1/sqrt(rank)); 'Init[B]'
    of arXiv 2406.08447. Each layer and site draws from its own stream, so that a site's
    start does not depend on which others are trained. Magnitudes are the base's: see
    `dora`.
    """
    tree: dict[str, Any] = {}
    for path, plan_at in plan.sites.items():
        site = plan_at.site
        fan_in, rank = math.prod(site.inputs), plan_at.rank
        a = np.zeros((len(plan_at.ranks), *site.inputs, rank), np.float32)
        b = np.zeros((len(plan_at.ranks), rank, *site.outputs), np.float32)
        for layer, name in enumerate(site_names(site)):
            r = plan_at.ranks[layer]
            rng = stream(seed, name)
            if r and init == "a_zero":
                b[layer, :r] = rng.uniform(-1, 1, (r, *site.outputs)) / math.sqrt(r)
                continue
            if r and init == "gaussian":
                draw = rng.normal(0, 1 / r, (*site.inputs, r))
            else:
                draw = rng.uniform(-1, 1, (*site.inputs, r)) / math.sqrt(fan_in)
            a[layer, ..., :r] = draw
        scale = np.asarray(plan_at.scales, np.float32)
        if site.layers is None:
            a, b, scale = a[0], b[0], scale[0]
        put(tree, path, {"w": _delta(a, b, scale, plan.dropout)})
    return tree


def _delta(a: np.ndarray, b: np.ndarray, scale: np.ndarray, dropout: float) -> Delta:
    return Delta(jnp.asarray(a), jnp.asarray(b), jnp.asarray(scale), dropout)


def lora_shapes(plan: LoraPlan) -> Any:
    """The shapes of the collection, by arithmetic: nothing is drawn."""
    tree: dict[str, Any] = {}
    for path, at in plan.sites.items():
        stack = () if at.site.layers is None else (at.site.layers,)
        shapes = {
            "a": (*stack, *at.site.inputs, at.rank),
            "b": (*stack, at.rank, *at.site.outputs),
            "scale": stack,
        }
        if at.dora:
            shapes["m"] = (*stack, *at.site.outputs)
        leaves: dict[str, Any] = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32)
            for name, shape in shapes.items()
        }
        put(tree, path, {"w": Delta(**leaves, dropout=plan.dropout)})
    return tree


def lora_axes(plan: LoraPlan) -> Any:
    """The logical axes of the collection's leaves, for the sharding rules."""
    tree: dict[str, Any] = {}
    for path, plan_at in plan.sites.items():
        site = plan_at.site
        cut = len(site.inputs)
        stack = () if site.layers is None else (None,)
        a = (*stack, *site.axes[:cut], None)
        b = (*stack, None, *site.axes[cut:])
        m = (*stack, *site.axes[cut:]) if plan_at.dora else None
        put(tree, path, {"w": Delta(a, b, stack, plan.dropout, m)})  # type: ignore
    return tree


def merge(params: Any, lora: Any) -> Any:
    """`params` with every update in its weight, in float32, cast back last."""

    def add(tree: Any, update: Any) -> Any:
        if isinstance(update, Delta):
            return update.applied(tree).astype(tree.dtype)
        return {k: add(v, update[k]) if k in update else v for k, v in tree.items()}

    return add(params, lora)
