"""Which weights of a model are quantized, and how: a loop over the projection sites."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from ftjax.errors import UserError
from ftjax.methods.patterns import each_matches, matches, pairs, patterns
from ftjax.models.proj import HEAD, Path, Site, put, site_names
from ftjax.quant.formats import Format, make_format, require_fit
from ftjax.quant.qtensor import QTensor, abstract, is_flat

NONE = "none"
Plan = dict[Path, Format]


def plan_quant(sites: Mapping[Path, Site], config: Any) -> Plan:
    """The format of each site that is quantized.

    Args:
      sites: of the model.
      config: `format` ('none' quantizes nothing), `group`, `scheme`, `double_quant`;
        `targets` ('all-linear': every projection of the layers; or regexes, as LoRA's)
        and `pattern` ('regex=format,...', the first that matches wins over `format`;
        'none' leaves a weight as it is).

    Raises:
      UserError: an unknown format, a group that does not divide, a pattern without a
        match, or one that parts the layers of a stack.
    """
    if config.format == NONE:
        return {}
    usual = make_format(
        config.format,
        group=config.group,
        scheme=config.scheme,
        double=config.double_quant,
    )
    everything = [name for site in sites.values() for name in site_names(site)]
    targets = patterns(config.targets, "config.quant.targets")
    own = pairs(config.pattern, "config.quant.pattern", str)
    each_matches(
        [p for p in targets if p != "all-linear"], everything, "config.quant.targets"
    )
    each_matches(list(own), everything, "config.quant.pattern")
    others = {p: _named(name) for p, name in own.items()}
    plan: Plan = {}
    for path, site in sites.items():
        chosen = [
            _choose(name, path, targets, others, usual) for name in site_names(site)
        ]
        if any(fmt != chosen[0] for fmt in chosen):
            raise UserError(
                "the layers of a stack would be quantized in different ways",
                where="config.quant.targets, config.quant.pattern",
                expected=f"one format for every layer's {path[-1]}",
                got=", ".join(sorted({str(fmt) for fmt in chosen})),
                fix="write patterns that do not depend on the layer",
            )
        if chosen[0] is not None:
            require_fit(chosen[0], math.prod(site.inputs), ".".join(path))
            plan[path] = chosen[0]
    if not plan:
        raise UserError("nothing would be quantized", where="config.quant")
    return plan


def _named(name: str) -> Format | None:
    return None if name == NONE else make_format(name, where="config.quant.pattern")


def _choose(
    name: str,
    path: Path,
    targets: list[str],
    others: Mapping[str, Format | None],
    usual: Format,
) -> Format | None:
    for pattern, fmt in others.items():
        if matches(pattern, name):
            return fmt
    if targets == ["all-linear"]:
        return None if path == HEAD else usual
    return usual if any(matches(p, name) for p in targets) else None


def abstract_quant(sites: Mapping[Path, Site], plan: Plan) -> Any:
    """The shapes of the collection."""
    tree: dict[str, Any] = {}
    for path, fmt in plan.items():
        site = sites[path]
        stack = () if site.layers is None else (site.layers,)
        put(tree, path, {"w": abstract(site.inputs, site.outputs, fmt, stack)})
    return tree


def quant_axes(sites: Mapping[Path, Site], plan: Plan) -> Any:
    """The logical axes of the collection's arrays, for the sharding rules.

    Several inputs, or outputs, share one axis of the codes: the first names it.
    """
    tree: dict[str, Any] = {}
    for path, fmt in plan.items():
        site = sites[path]
        cut = len(site.inputs)
        stack = () if site.layers is None else (None,)
        whole = is_flat(fmt, site.inputs)
        pair = (site.axes[0], site.axes[cut])

        def axes(
            leaf: Any, stack: Any = stack, pair: Any = pair, w: bool = whole
        ) -> Any:
            rank = len(leaf.shape)
            return (*stack, *(pair if rank == 2 and not w else (None,) * rank))

        shapes = abstract(site.inputs, site.outputs, fmt)
        put(tree, path, {"w": jax.tree.map(axes, shapes)})
    return tree


def without(params: Any, plan: Plan) -> Any:
    """A tree of `params`, or of its shapes or axes, less the quantized weights."""
    lost = {(*path, "w") for path in plan}

    def keep(tree: Any, at: Path) -> Any:
        if not isinstance(tree, dict):
            return tree
        kept = {k: keep(v, (*at, k)) for k, v in tree.items() if (*at, k) not in lost}
        return {k: v for k, v in kept.items() if not (isinstance(v, dict) and not v)}

    return keep(params, ())


def dequantize(params: Any, quant: Any) -> Any:
    """`params` with every quantized weight in its place again, float32."""

    def fill(tree: Any, codes: Any) -> Any:
        if isinstance(codes, QTensor):
            return codes.dense()
        filled = {key: fill(tree.get(key, {}), codes[key]) for key in codes}
        return {**tree, **filled}

    return fill(params, quant)
