"""Several low-rank updates of one base: their weighted sum, and one for each row.

Both put the updates side by side: [a1 a2] and [b1; b2] have the summed rank, and
a1.b1 + a2.b2 is their product. PEFT calls it `add_weighted_adapter` with
combination_type='cat'.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ftjax.errors import UserError
from ftjax.methods.lora import LoraPlan, SitePlan, lora_axes
from ftjax.models.proj import Path, Site, put
from ftjax.weights import Delta, Stack


class Update(NamedTuple):
    """A LoRA collection and the plan that it was made by."""

    lora: Any
    plan: LoraPlan


class _Side(NamedTuple):
    """The updates of one site, side by side; I inputs, O outputs, R the summed rank.

    Each scale is folded into its a. Smaller layers are padded at the end.
    """

    plan: SitePlan
    a_LIR: np.ndarray
    b_LRO: np.ndarray
    owner_LR: np.ndarray  # which update a column is of; -1 for padding


def combine(
    updates: Sequence[Update | None], weights: Sequence[float], rank: int = 0
) -> Update | None:
    """The sum of weight * update, exact: the ranks add up, alpha is the rank.

    Args:
      updates: of the same base; None changes nothing.
      weights: one for each.
      rank: brings the sum back to at most so many ranks: for each layer the nearest
        such matrix, by its singular values (Eckart and Young). 0: leaves it exact.

    Returns:
      float32 on the host, without dropout; None where there is no update.

    Raises:
      UserError: an update that is no plain product.
    """
    gains = np.asarray([*weights, 0.0], np.float32)  # the last is that of padding
    tree: dict[str, Any] = {}
    plans = {}
    for side in _side_by_side(updates):
        a_LIR = side.a_LIR * gains[side.owner_LR][:, None, :]
        ranks, b_LRO = side.plan.ranks, side.b_LRO
        if rank:
            a_LIR, b_LRO, ranks = _nearest(a_LIR, b_LRO, ranks, rank)
        at = _plan(side.plan.site, ranks)
        plans[at.site.path] = at
        scale = np.asarray(at.scales, np.float32)
        a, b, scale = _shaped(at.site, a_LIR, b_LRO, scale)
        put(tree, at.site.path, {"w": Delta(a, b, scale)})
    return Update(tree, LoraPlan(plans)) if plans else None


def stack(
    updates: Sequence[Update | None], choices: Sequence[Sequence[float]] | None = None
) -> tuple[Any, Any]:
    """A collection of `Stack`s, for `weights.choose`; and its logical axes.

    Args:
      updates: of the same base; None is the base itself.
      choices: weights of all the updates, for each choice; each alone if None.

    Raises:
      UserError: an update that is no plain product.
    """
    mixes_KN = np.eye(len(updates)) if choices is None else np.asarray(choices)
    mixes_KN = np.pad(mixes_KN, ((0, 0), (0, 1))).astype(np.float32)
    tree: dict[str, Any] = {}
    axes: dict[str, Any] = {}
    for side in _side_by_side(updates):
        site = side.plan.site
        factors_LKR = np.moveaxis(mixes_KN[:, side.owner_LR], 0, 1)
        leaf = Stack(*_shaped(site, side.a_LIR, side.b_LRO, factors_LKR))
        put(tree, site.path, {"w": leaf})
        split = _get(lora_axes(LoraPlan({site.path: side.plan})), site.path)
        shared: Any = (*split.scale, None, None)
        put(axes, site.path, {"w": Stack(split.a, split.b, shared)})
    return tree, axes


def _side_by_side(updates: Sequence[Update | None]) -> list[_Side]:
    """What there is at each site that any update has."""
    given = [(n, update) for n, update in enumerate(updates) if update is not None]
    sites: dict[Path, Site] = {}
    for _, update in given:
        sites |= {path: at.site for path, at in update.plan.sites.items()}
    return [
        _concatenate(
            site,
            {
                n: (_delta(update.lora, path), update.plan.sites[path])
                for n, update in given
                if path in update.plan.sites
            },
        )
        for path, site in sites.items()
    ]


def _concatenate(site: Site, found: dict[int, tuple[Delta, SitePlan]]) -> _Side:
    ranks = tuple(map(sum, zip(*(at.ranks for _, at in found.values()), strict=True)))
    count, size, rank = len(ranks), math.prod(site.inputs), max(ranks)
    a_LIR = np.zeros((count, size, rank), np.float32)
    b_LRO = np.zeros((count, rank, math.prod(site.outputs)), np.float32)
    owner_LR = np.full((count, rank), -1)
    filled = [0] * count
    for n, (delta, at) in found.items():
        a = np.asarray(delta.a, np.float32).reshape(count, size, -1)
        b = np.asarray(delta.b, np.float32).reshape(count, a.shape[-1], -1)
        scale = np.asarray(delta.scale, np.float32).reshape(count)
        for i, r in enumerate(at.ranks):
            cut = slice(filled[i], filled[i] + r)
            a_LIR[i, :, cut] = scale[i] * a[i, :, :r]
            b_LRO[i, cut] = b[i, :r]
            owner_LR[i, cut] = n
            filled[i] += r
    return _Side(_plan(site, ranks), a_LIR, b_LRO, owner_LR)


def _plan(site: Site, ranks: tuple[int, ...]) -> SitePlan:
    """Ranks at a scale of 1."""
    return SitePlan(site, ranks, tuple(float(rank or 1) for rank in ranks))


def _nearest(
    a_LIR: np.ndarray, b_LRO: np.ndarray, ranks: tuple[int, ...], rank: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Each layer's a.b at no more than `rank`, by way of the small factors of both."""
    size_I = a_LIR.shape[1]
    less = tuple(min(rank, r, size_I, b_LRO.shape[-1]) for r in ranks)
    keep = max(less)
    a_new = np.zeros((*a_LIR.shape[:2], keep), np.float32)
    b_new = np.zeros((b_LRO.shape[0], keep, b_LRO.shape[2]), np.float32)
    for i, r in enumerate(less):
        qa, ra = np.linalg.qr(a_LIR[i].astype(np.float64))
        qb, rb = np.linalg.qr(b_LRO[i].T.astype(np.float64))
        u, s, vt = np.linalg.svd(ra @ rb.T)
        root = np.sqrt(s[:r])
        a_new[i, :, :r] = (qa @ u[:, :r]) * root
        b_new[i, :r] = root[:, None] * (vt[:r] @ qb.T)
    return a_new, b_new, less


def _shaped(
    site: Site, a_LIR: np.ndarray, b_LRO: np.ndarray, last: np.ndarray
) -> tuple[Any, Any, Any]:
    """As the collection has them: a stack of layers, or one piece."""
    lead = () if site.layers is None else (site.layers,)
    a = a_LIR.reshape(*lead, *site.inputs, a_LIR.shape[-1])
    b = b_LRO.reshape(*lead, b_LRO.shape[1], *site.outputs)
    return a, b, last.reshape(*lead, *last.shape[1:])


def _delta(lora: Any, path: Path) -> Delta:
    """The update of a site. With a magnitude it is no sum: PEFT refuses it too."""
    delta = _get(lora, path)
    if delta.m is not None:
        raise UserError(
            "an adapter that is more than a low-rank product cannot be combined",
            where=".".join(path),
            expected="plain LoRA: a, b and a scale",
            got="a magnitude beside them (DoRA)",
            fix="merge it into the base first (ftjax.export --to=merged)",
        )
    return delta


def _get(tree: Any, path: Path) -> Any:
    for name in (*path, "w"):
        tree = tree[name]
    return tree
