"""Updates that begin as a part of the weights; the base is what is left of them.

PiSSA (arXiv 2404.02948): W = U S V, scale * a.b is the share of the r largest singular
values. OLoRA (arXiv 2406.01775): W = Q R, b is the first r columns of Q and a the first
r rows of R.

As PEFT's `pissa_init` and `olora_init`: `W - scale * a.b` is frozen, so that the policy
begins as the base whatever the scale. Over a quantized base that residual is what is
quantized (QPiSSA).

What is frozen is not in a checkpoint: each command takes the weights apart again. It is
done in float64 and rounded once, on the host. The same machine gives the same bits;
another LAPACK may turn signs, which the product does not see, and the last bit of a
float32 here and there. Only where singular values number r and r + 1 are equal could it
choose another product.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import scipy.linalg

from ftjax.errors import UserError
from ftjax.methods.lora import LoraPlan, SitePlan
from ftjax.methods.quant import Plan
from ftjax.methods.several import Update, combine
from ftjax.models.proj import Path, put
from ftjax.weights import Delta

# (layer, w [O, I] float32) -> what is kept, or quantized, in its place
Change = Callable[[int, np.ndarray], np.ndarray]
Factors = tuple[np.ndarray, np.ndarray]  # a [I, r], b [r, O], float32


class Split(Protocol):
    def __call__(
        self, at: SitePlan, w_IO: np.ndarray, rank: int, scale: float
    ) -> tuple[np.ndarray, Factors]:
        """(what is left of a weight, what its update begins as)."""


class Beginning:
    """What weights become while they are read, and what their updates begin as.

    Reading with `changes` finds the updates; `update` has them when all is read.

    Attributes:
      changes: by the path of the projection.
      moves: whether what is read is another base, so that the trained update belongs
        to it alone: see `beyond`.
    """

    def __init__(self, plan: LoraPlan, split: Split, *, moves: bool):
        self._plan, self._split, self.moves = plan, split, moves
        self._found: dict[tuple[Path, int], Factors] = {}
        self.changes: dict[Path, Change] = {
            path: partial(self._change, at) for path, at in plan.sites.items()
        }

    def _change(self, at: SitePlan, layer: int, w_OI: np.ndarray) -> np.ndarray:
        rank, scale = at.ranks[layer], at.scales[layer]
        if not rank:
            return w_OI
        left_IO, factors = self._split(at, w_OI.T, rank, scale)
        self._found[at.site.path, layer] = factors
        return np.ascontiguousarray(left_IO.T)

    @property
    def update(self) -> Update:
        """The updates at the start, float32, on the host."""
        tree: dict[str, Any] = {}
        for path, at in self._plan.sites.items():
            inputs, outputs = math.prod(at.site.inputs), math.prod(at.site.outputs)
            a = np.zeros((len(at.ranks), inputs, at.rank), np.float32)
            b = np.zeros((len(at.ranks), at.rank, outputs), np.float32)
            for layer, rank in enumerate(at.ranks):
                if rank:
                    a[layer, :, :rank], b[layer, :rank] = self._found[path, layer]
            stack = () if at.site.layers is None else (at.site.layers,)
            a = a.reshape(*stack, *at.site.inputs, at.rank)
            b = b.reshape(*stack, at.rank, *at.site.outputs)
            scale = np.asarray(at.scales, np.float32).reshape(stack)
            delta: Any = Delta(a, b, scale, self._plan.dropout)  # type: ignore[arg-type]
            put(tree, path, {"w": delta})
        return Update(tree, self._plan)

    def fill(self, lora: Any) -> Any:
        """A collection, with what was found in its place."""

        def over(tree: Any, own: Any) -> Any:
            if isinstance(own, Delta):
                return dataclasses.replace(tree, a=own.a, b=own.b)
            return {k: over(v, own[k]) if k in own else v for k, v in tree.items()}

        return over(lora, self.update.lora)


def begin_residual(kind: str, plan: LoraPlan, stored: Plan) -> Beginning:
    """The beginning of PiSSA or OLoRA.

    Args:
      kind: 'pissa' or 'olora'.
      plan: of the update.
      stored: formats of the weights whose files hold codes.

    Raises:
      UserError: a target is stored quantized.
    """
    lost = [path for path in plan.sites if path in stored]
    if lost:
        raise UserError(
            "a base that is stored quantized cannot be taken apart",
            where=f"config.method.init for {'.'.join(lost[0])}",
            expected=f"with {kind}, a base with its weights",
            got=f"codes: {stored[lost[0]]}",
            fix="pass the unquantized model with method=qlora: what is left of it is"
            " quantized while it is read; or --config.method.init=kaiming",
        )
    start = {"pissa": nearest, "olora": orthogonal}[kind]

    def split(
        at: SitePlan, w_IO: np.ndarray, rank: int, scale: float
    ) -> tuple[np.ndarray, Factors]:
        factors = start(w_IO, rank, scale)
        return less(w_IO, factors, scale), factors

    return Beginning(plan, split, moves=True)


def nearest(w_IO: np.ndarray, rank: int, scale: float) -> Factors:
    """(a [I, r], b [r, O]) with scale * a.b nearest to w (Eckart and Young).

    The singular values are shared equally, and divided by the scale. By way of the
    smaller Gram matrix, in float64: only r of its eigenvectors are computed (on two
    cores 0.4 s for 2048 x 2048, against 2.6 s for the decomposition of w itself).
    """
    if w_IO.shape[0] > w_IO.shape[1]:
        b_OR, a_RI = nearest(w_IO.T, rank, scale)
        return np.ascontiguousarray(a_RI.T), np.ascontiguousarray(b_OR.T)
    w, size = w_IO.astype(np.float64), w_IO.shape[0]
    _, ascending = scipy.linalg.eigh(w @ w.T, subset_by_index=[size - rank, size - 1])
    u_IR = ascending[:, ::-1]
    share_RO = u_IR.T @ w
    s_R = np.linalg.norm(share_RO, axis=1)
    root_R = np.sqrt(s_R / scale)
    over_R = np.divide(root_R, s_R, out=np.zeros_like(s_R), where=s_R > 0)
    a, b = u_IR * root_R, over_R[:, None] * share_RO
    return a.astype(np.float32), b.astype(np.float32)


def orthogonal(w_IO: np.ndarray, rank: int, scale: float) -> Factors:
    """OLoRA's (a, b); as in PEFT the scale is in what is taken off, not in them.

    The first r columns of Q depend on the first r columns of W [O, I] alone.
    """
    w = w_IO.astype(np.float64)
    q_OR, _ = np.linalg.qr(w[:rank].T)
    return (w @ q_OR).astype(np.float32), q_OR.T.astype(np.float32)


def less(w_IO: np.ndarray, factors: Factors, scale: float) -> np.ndarray:
    """w - scale * a.b, rounded once to float32."""
    a, b = (x.astype(np.float64) for x in factors)
    return (w_IO - scale * (a @ b)).astype(np.float32)


def beyond(lora: Any, plan: LoraPlan, origin: Update) -> Update:
    """What an update has learned, as a plain one of the base that is whole.

    W_res + s a.b = W + s (a.b - a0.b0), of rank 2r: what PEFT saves under
    `path_initial_model_for_weight_conversion`. The scale is folded into a. Over a
    quantized base it leaves out what rounding took from W_res.
    """
    learned = combine([Update(lora, plan), origin], [1.0, -1.0])
    if learned is None:
        raise ValueError("an update without sites")
    return learned


def unmoved(lora: Any, origin: Update | None) -> bool:
    """Whether the updates of `origin` are still what they were at the start."""

    def equal(tree: Any, own: Any) -> bool:
        if isinstance(own, Delta):
            pairs = ((tree.a, own.a), (tree.b, own.b))
            return all(np.array_equal(np.asarray(x), y) for x, y in pairs)
        return all(equal(tree[name], own[name]) for name in own)

    return origin is not None and equal(lora, origin.lora)
