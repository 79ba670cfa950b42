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


def plan_quant(
    sites: Mapping[Path, Site], config: Any, prefix: str = "config.quant."
) -> Plan:
    """The format of each site that is quantized.

    Args:
      sites: of the model.
      config: `format` ('none' quantizes nothing), `group`, `scheme`, `double_quant`;
        `targets` ('all-linear': every projection of the layers; or regexes, as LoRA's)
        and `pattern` ('regex=format,...', the first that matches wins over `format`;
        'none' leaves a weight as it is).
      prefix: of the settings' names in messages.

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
        prefix=prefix,
    )
    everything = [name for site in sites.values() for name in site_names(site)]
    targets = patterns(config.targets, f"{prefix}targets")
    own = pairs(config.pattern, f"{prefix}pattern", str)
    each_matches(
        [p for p in targets if p != "all-linear"], everything, f"{prefix}targets"
    )
    each_matches(list(own), everything, f"{prefix}pattern")
    others = {p: _named(name, prefix) for p, name in own.items()}
    plan: Plan = {}
    for path, site in sites.items():
        chosen = [
            _choose(name, path, targets, others, usual) for name in site_names(site)
        ]
        _require_one(chosen, path, prefix)
        if chosen[0] is not None:
            inputs = math.prod(site.inputs)
            require_fit(chosen[0], inputs, ".".join(path), prefix)
            plan[path] = chosen[0]
    if not plan:
        raise UserError("nothing would be quantized", where=f"{prefix}targets")
    return plan


def _require_one(chosen: list[Format | None], path: Path, prefix: str) -> None:
    if any(fmt != chosen[0] for fmt in chosen):
        raise UserError(
            "the layers of a stack would be quantized in different ways",
            where=f"{prefix}targets, {prefix}pattern",
            expected=f"one format for every layer's {path[-1]}",
            got=", ".join(sorted({str(fmt) for fmt in chosen})),
            fix="write patterns that do not depend on the layer",
        )


def stored_plan(stored: Plan, asked: Plan, name: str, full: bool) -> Plan:
    """The plan of a base that is stored quantized: `stored`, or an error.

    Args:
      stored: what its files hold.
      asked: from `quant.format`; empty, or the same.
      name: of the model, for messages.
      full: whether every weight is to be trained.
    """
    kinds = ", ".join(sorted({str(fmt) for fmt in stored.values()}))
    if full:
        raise UserError(
            "a quantized base cannot be trained: its codes have no gradient",
            where="config.method.name",
            expected=f"method=lora on {name}, or a base that is not quantized",
            got=f"method=full, weights stored as {kinds}",
        )
    wrong = [path for path, fmt in asked.items() if stored.get(path) != fmt]
    if wrong:
        fmt = asked[wrong[0]]
        raise UserError(
            "the base is quantized already, in another way",
            where=f"config.quant for {'.'.join(wrong[0])} of {name}",
            expected=f"quant.format=none: its own format is used ({kinds})",
            got=str(fmt),
            fix="leave quant.format at none, or start from the unquantized model",
        )
    return stored


def _named(name: str, prefix: str) -> Format | None:
    return None if name == NONE else make_format(name, prefix=f"{prefix}pattern: ")


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
