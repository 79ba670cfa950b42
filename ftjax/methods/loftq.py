"""LoftQ: the update begins as what quantization took from its weight.

arXiv 2310.08659, with one step of its alternation, as PEFT's
`replace_lora_weights_loftq` does: the codes stay those of the weight itself, so that a
checkpoint needs no decomposition to be loaded, and the base is that of every other run.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import UserError
from ftjax.methods.lora import LoraPlan, SitePlan
from ftjax.methods.quant import Plan
from ftjax.models.proj import Path, find, put
from ftjax.quant.qtensor import QTensor
from ftjax.weights import Delta

Read = Callable[[Path, int], np.ndarray]  # (site, layer) -> [outputs, inputs], float32


def require_codes(plan: LoraPlan, formats: Plan, stored: bool) -> None:
    """LoftQ needs targets that are quantized while they are read.

    Args:
      plan: of the update.
      formats: of the base.
      stored: whether the base's files hold codes instead of weights.

    Raises:
      UserError: otherwise.
    """
    if stored or not any(path in formats for path in plan.sites):
        raise UserError(
            "there is no quantization error to begin with",
            where="config.method.init",
            expected="with loftq, targets that are quantized while the base is read",
            got="a base that is stored quantized: its weights are gone"
            if stored
            else "targets that stay floating point",
            fix="pass the unquantized model with method=qlora, or"
            " --config.method.init=kaiming",
        )


def fit_errors(lora: Any, plan: LoraPlan, quant: Any, read: Read) -> Any:
    """The collection with scale * a.b near to W - Q(W), the nearest of its rank.

    Targets that are not quantized keep their start. The policy is then not its
    quantized base at the start, but nearer to the base that was quantized.

    Args:
      lora: at another start; only its shapes matter where a target is quantized.
      plan: that it was made by.
      quant: the quantized base.
      read: gives a weight as it was before; one is in memory at a time.
    """
    tree: dict[str, Any] = {}
    for path, at in plan.sites.items():
        delta, codes = find(lora, path), find(quant, path)
        if codes is not None:
            delta = _fit(delta, at, codes, partial(read, path))
        put(tree, path, {"w": delta})
    return tree


def _fit(
    delta: Delta, at: SitePlan, codes: QTensor, read: Callable[[int], np.ndarray]
) -> Delta:
    inputs, outputs = math.prod(at.site.inputs), math.prod(at.site.outputs)
    a = np.zeros((len(at.ranks), inputs, at.rank), np.float32)
    b = np.zeros((len(at.ranks), at.rank, outputs), np.float32)
    for layer, (rank, scale) in enumerate(zip(at.ranks, at.scales, strict=True)):
        if rank:
            own = jax.tree.map(lambda x, i=layer: x[i], codes) if codes.stack else codes
            error_IO = read(layer).T - np.asarray(own.dense()).reshape(inputs, outputs)
            a[layer, :, :rank], b[layer, :rank] = nearest(error_IO, rank, scale)
    return dataclasses.replace(
        delta,
        a=jnp.asarray(a.reshape(delta.a.shape)),
        b=jnp.asarray(b.reshape(delta.b.shape)),
    )


def nearest(w_IO: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(a [I, r], b [r, O]) with scale * a.b nearest to w (Eckart and Young).

    The singular values are shared equally. PEFT forgets the scale, so that there the
    product is only right for alpha = r; here it is divided out.
    """
    u_IK, s_K, v_KO = np.linalg.svd(w_IO, full_matrices=False)
    root_r = np.sqrt(s_K[:rank] / scale)
    return u_IK[:, :rank] * root_r, root_r[:, None] * v_KO[:rank]
