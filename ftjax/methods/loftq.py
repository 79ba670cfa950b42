"""LoftQ: the update begins as what quantization took from its weight.

arXiv 2310.08659: q = Q(W - s a.b) and s a.b = the nearest of its rank to W - q, by
turns. PEFT forgets the scale s, so that its product is right for alpha = r alone; here
it is divided out.

With one turn, as PEFT's `replace_lora_weights_loftq`, the codes are those of the weight
itself: a checkpoint needs no decomposition to be loaded, and the base is that of every
other run. With more, as PEFT's `loftq_init`, the codes are others: they are made again
for each use (`residual` says what that assumes), and the update is right over them
alone.
"""

from functools import partial

import jax
import numpy as np

from ftjax.errors import UserError
from ftjax.methods.lora import LoraPlan, SitePlan
from ftjax.methods.quant import Plan
from ftjax.methods.residual import Beginning, Factors, less, nearest
from ftjax.quant.encode import host_device
from ftjax.quant.formats import Format
from ftjax.quant.qtensor import quantize


def begin_loftq(plan: LoraPlan, formats: Plan, stored: Plan, turns: int) -> Beginning:
    """LoftQ's beginning: of the targets that are quantized; the others begin as ever.

    Args:
      plan: of the update.
      formats: of the base.
      stored: of those, the ones whose files hold codes.
      turns: of the alternation; more than 1 change the codes.

    Raises:
      UserError: no target is quantized while it is read.
    """
    sites = {path: at for path, at in plan.sites.items() if path in formats}
    if stored or not sites:
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
    split = partial(alternate, formats, turns)
    return Beginning(LoraPlan(sites, plan.dropout), split, moves=turns > 1)


def alternate(
    formats: Plan, turns: int, at: SitePlan, w_IO: np.ndarray, rank: int, scale: float
) -> tuple[np.ndarray, Factors]:
    """(what is quantized instead of a weight, its update) after so many turns."""
    fmt, left_IO = formats[at.site.path], w_IO
    factors = nearest(w_IO - rounded(left_IO, at, fmt), rank, scale)
    for _ in range(turns - 1):
        left_IO = less(w_IO, factors, scale)
        factors = nearest(w_IO - rounded(left_IO, at, fmt), rank, scale)
    return left_IO, factors


def rounded(w_IO: np.ndarray, at: SitePlan, fmt: Format) -> np.ndarray:
    """What the codes of a weight stand for; on the host, so that it is always alike."""
    with jax.default_device(host_device()):
        codes = quantize(w_IO.T, at.site.inputs, at.site.outputs, fmt)
        return np.asarray(codes.dense()).reshape(w_IO.shape)
