"""From a config to a method: what it trains, by shape alone.

    method = plan_method(model, config.method)
    trained, frozen = method.start(base, seed)        # no array is in both
    model.apply(join(frozen, trained), ...)           # the policy
    model.apply(frozen, ...)                          # the base, if `frozen_is_base`

A method is a function here or in a file beside this one, and a line of `METHODS`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax

from ftjax.methods.bottleneck import plan_bottleneck
from ftjax.methods.dora import with_magnitudes
from ftjax.methods.freeze import plan_freeze, train_also
from ftjax.methods.ia3 import plan_ia3
from ftjax.methods.loftq import begin_loftq
from ftjax.methods.lora import LoraPlan, init_lora, lora_axes, lora_shapes, plan_lora
from ftjax.methods.parts import Method, Part, PyTree, Row, in_dtype, master
from ftjax.methods.quant import Plan
from ftjax.methods.residual import Beginning, begin_residual
from ftjax.methods.vera import plan_vera
from ftjax.methods.virtual import plan_prefix, plan_prompt
from ftjax.models.decoder import Decoder
from ftjax.models.proj import Path, Site, abstract_params, find_sites, params_axes

FROM_WEIGHTS = ("pissa", "olora", "loftq")


def plan_method(model: Decoder, config: Any) -> Method:
    """The method of a config, `config.method`.

    Raises:
      UserError: a target without a match, a rank that does not fit.
    """
    method = METHODS[config.name](model, find_sites(model), config)
    dtype = getattr(config, "dtype", "float32")
    if dtype != "float32":
        method = in_dtype(method, dtype)
    return train_also(method, model, getattr(config, "also_train", ""))


def _full(model: Decoder, sites: Mapping[Path, Site], config: Any) -> Method:
    def init(base: PyTree, seed: int) -> PyTree:
        return jax.tree.map(master, base)

    part = Part(abstract_params(model), params_axes(model))
    return Method(
        "full",
        {"params": part},
        init,
        lambda base: {},
        whole=True,
        frozen_is_base=False,
    )


def _lora(model: Decoder, sites: Mapping[Path, Site], config: Any) -> Method:
    plan = plan_lora(sites, config)
    kind = getattr(config, "init", "kaiming")
    turns = getattr(config, "loftq_iters", 1)  # runs from before there were more

    def begin(formats: Plan, stored: Plan) -> Beginning:
        if kind == "loftq":
            return begin_loftq(plan, formats, stored, turns)
        return begin_residual(kind, plan, stored)

    def init(base: PyTree, seed: int) -> PyTree:
        lora = init_lora(plan, seed, kind)
        return {"lora": with_magnitudes(lora, plan, base)}

    part = Part(lora_shapes(plan), lora_axes(plan))
    method = Method("lora", {"lora": part}, init, rows=_lora_rows(plan), lora=plan)
    if kind not in FROM_WEIGHTS:
        return method
    whole = kind == "loftq" and turns == 1
    return replace(method, begin=begin, frozen_is_base=whole)


METHODS: dict[str, Callable[[Decoder, Mapping[Path, Site], Any], Method]] = {
    "lora": _lora,
    "full": _full,
    "freeze": plan_freeze,
    "bottleneck": plan_bottleneck,
    "ia3": plan_ia3,
    "vera": plan_vera,
    "prompt": plan_prompt,
    "prefix": plan_prefix,
}


def _lora_rows(plan: LoraPlan) -> list[Row]:
    rows = []
    for path, at in plan.sites.items():
        inputs, outputs = math.prod(at.site.inputs), math.prod(at.site.outputs)
        layers = sum(rank > 0 for rank in at.ranks)
        ranks = "/".join(map(str, sorted({rank for rank in at.ranks if rank})))
        share = 100 * at.count / (layers * inputs * outputs)
        size = f"{inputs} x {outputs}"
        rows.append(Row(path[-1], size, ranks, layers, at.count, share))
    return rows
