"""A policy as one tree of dense weights, and what rounding that tree changes.

W + scale * a.b          of a float base
dequantized W, the same  of a quantized one
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.asked import Asked, read_batches
from ftjax.checkpoints.hf_save import Host
from ftjax.console import say
from ftjax.errors import UserError
from ftjax.evals.change import change
from ftjax.loading import load_base, open_base
from ftjax.methods.heads import SCORE
from ftjax.methods.ia3 import merge_ia3
from ftjax.methods.lora import merge
from ftjax.methods.quant import dequantize
from ftjax.models.decoder import Decoder
from ftjax.models.names import Path as LeafPath
from ftjax.models.names import Weight
from ftjax.models.vera import as_lora
from ftjax.policy import Policy
from ftjax.quant.qtensor import QTensor
from ftjax.sharding import batch_sharding, make_mesh


def merged_params(policy: Policy, *, head: bool = False) -> Any:
    """The weights that a policy computes with, dense, in one tree.

    Args:
      policy: a base with what was learned.
      head: whether that of a reward model has a place beside them.

    Raises:
      UserError: it has learned something that is no weight.
    """
    others = policy.variables.keys() - {"params", "quant", "lora", "vera", "ia3"}
    others -= {SCORE} if head else set()
    if others:
        raise UserError(
            "what was learned does not fit into the weights of the model",
            where=policy.label,
            expected="an update of weights: lora, vera, ia3, or weights themselves",
            got=", ".join(sorted(others)),
            fix="use it as it is, with --workdir or --adapter",
        )
    params = policy.variables["params"]
    if "quant" in policy.variables:
        params = jax.jit(dequantize)(params, policy.variables["quant"])
    if "lora" in policy.variables:
        params = jax.jit(merge)(params, policy.variables["lora"])
    if "vera" in policy.variables:
        params = jax.jit(_merge_vera)(params, policy.variables["vera"])
    if "ia3" in policy.variables:
        params = jax.jit(merge_ia3)(params, policy.variables["ia3"])
    return params


def _merge_vera(params: Any, vera: Any) -> Any:
    return merge(params, as_lora(vera))


def kinds(quant: Any) -> str:
    """The formats of a `quant` collection, for people."""
    leaves = jax.tree.leaves(quant, is_leaf=lambda x: isinstance(x, QTensor))
    return "; ".join(sorted({str(leaf.format) for leaf in leaves}))


def tree_reader(params: Any) -> Callable[[LeafPath, Weight, int], np.ndarray]:
    """Reads what `save_quantized` asks for out of a tree of arrays."""
    hosts: dict[LeafPath, Host] = {}

    def read(path: LeafPath, weight: Weight, i: int) -> np.ndarray:
        if path not in hosts:
            leaf = params
            for key in path:
                leaf = leaf[key]
            hosts[path] = Host(leaf, weight)
        return np.ascontiguousarray(hosts[path].stored(i))

    return read


def measure_change(
    folder: Path, policy: Policy, params: Any, args: Any
) -> dict[str, float]:
    """Of the folder as it was written, against the merge before it was quantized."""
    mesh = make_mesh()
    asked = Asked(
        args.data,
        args.split,
        rows=args.rows,
        max_length=min(args.max_length, policy.base.spec.max_positions),
        batch_size=1,
    )
    batches, _ = read_batches(asked, policy.base, mesh)
    written = open_base(str(folder), note=lambda _: None)
    after = load_base(written, jnp.float32, mesh, note=lambda _: None)
    return change(
        Decoder(policy.base.spec),
        {"params": params},
        after,
        batches,
        batch_sharding(mesh),
    )


def tell_change(found: dict[str, Any]) -> None:
    """Prints what `ftjax.export` has found out about a merge."""
    if "base" in found:
        say(f"the base was {found['base']}, then the update was added")
    if "change" in found:
        c = found["change"]
        say(
            f"quantized again, against the merge in float32: loss"
            f" {c['loss_before']:.5f} -> {c['loss_after']:.5f}, KL {c['kl']:.5f}"
            f" nats a token, |logits| moved by {c['logits_mean']:.4f} (at most"
            f" {c['logits_max']:.3f}), {c['agree']:.2%} of {c['tokens']:,} likeliest"
            f" tokens the same"
        )
