"""Which adapters, and how much of each: what --adapter and its flags say.

    --adapter=A                                one
    --adapter=A,B --adapter_weights=0.7,0.3    their sum; without weights 1 each
    --adapter=none,A                           'none' is the base: with --use, a choice

Reading is here; `ftjax.switch` puts others on a policy that is open.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ftjax.checkpoints.peft_others import Adapter, load_any
from ftjax.checkpoints.peft_saved import with_saved
from ftjax.errors import UserError
from ftjax.loading import place_head
from ftjax.methods.heads import SCORE
from ftjax.methods.lora import LoraPlan, lora_axes
from ftjax.methods.several import Update, combine
from ftjax.models.decoder import Decoder
from ftjax.models.proj import find_sites
from ftjax.models.spec import ModelSpec
from ftjax.sharding import replicated, shard_tree

NONE = "none"
Known = Mapping[str, Adapter | None]  # by the name that was asked for, in order
Check = Callable[[Adapter, str], None]


@dataclass(frozen=True)
class Chosen:
    """Adapters that were read, and their sum.

    Attributes:
      names: as they were asked for; `NONE` is the base.
      adapter: the one, or the sum, on the host; None where it changes nothing.
      label: for people, such as 'adapter A'; empty where nothing was asked for.
      known: all that were read, by name.
    """

    names: tuple[str, ...]
    adapter: Adapter | None
    label: str
    known: Known

    @property
    def plan(self) -> LoraPlan | None:
        """Of a low-rank update."""
        return self.adapter.plan if self.adapter else None

    def variables(self, mesh: Mesh) -> dict[str, Any]:
        """Its collection, on its devices; empty where it changes nothing."""
        if self.adapter is None:
            return {}
        tree, places = self.adapter.tree, replicated(mesh)
        if self.plan is not None:
            places = shard_tree(tree, lora_axes(self.plan), mesh)
        return {self.adapter.kind: jax.device_put(tree, places)}

    def over(self, base: dict[str, Any], spec: ModelSpec, mesh: Mesh) -> dict[str, Any]:
        """A base's variables with the adapter, and the weights that it brings."""
        found = {**base, **self.variables(mesh)}
        if self.adapter and self.adapter.saved:
            saved, where = self.adapter.saved, f"--adapter: {self.names[0]}"
            found["params"] = with_saved(base["params"], saved, spec, where)
        if self.adapter and self.adapter.head is not None:
            found[SCORE] = place_head(self.adapter.head, spec, mesh)
        return found


def read_adapters(
    text: str,
    weights: str = "",
    rank: int = 0,
    *,
    model: Decoder,
    check: Check,
    known: Known | None = None,
) -> Chosen:
    """Reads what `--adapter`, `--adapter_weights` and `--adapter_rank` say.

    Args:
      text: see `names_of`.
      weights: numbers, as many; all 1 if empty.
      rank: of the sum, or 0: see `several.combine`.
      model: that they are for.
      check: raises where an adapter does not belong to this base.
      known: not read again.

    Raises:
      UserError: naming the flag, the folder, the file or the tensor.
    """
    names = names_of(text)
    gains = _gains(weights, names)
    if rank and not names:
        raise UserError("a rank without adapters", where="--adapter_rank")
    read = dict(known or {})
    for name in names:
        if name not in read:
            read[name] = None if name == NONE else _read(name, model, check)
    label = _label(names, gains, rank)
    if len(names) == 1 and gains == [1] and not rank:
        return Chosen(names, read[names[0]], label, read)
    total = combine(updates(read, names), gains, rank)
    summed = Adapter("lora", total.lora, total.plan, "", None) if total else None
    return Chosen(names, summed, label, read)


def updates(known: Known, names: Sequence[str]) -> list[Update | None]:
    """The low-rank updates of some adapters; None for the base.

    Raises:
      UserError: an adapter is of another kind: only updates add up.
    """
    found: list[Update | None] = []
    for name in names:
        one = known[name]
        whole = (*one.saved, *([SCORE] if one.head is not None else [])) if one else ()
        if one is not None and (one.plan is None or whole):
            got = f"an adapter of kind {one.kind}"
            raise UserError(
                "only low-rank adapters can be added, scaled, switched or chosen from",
                where=f"--adapter: {name}",
                got=f"{got}, with {min(whole)}" if whole else got,
                fix="use it alone",
            )
        found.append(Update(one.tree, one.plan) if one and one.plan else None)
    return found


def names_of(text: str) -> tuple[str, ...]:
    """The folders that `--adapter` names; a folder with a comma in its name is one."""
    if not text:
        return ()
    whole = Path(text).expanduser().is_dir()
    names = [text] if whole else [name.strip() for name in text.split(",")]
    if "" in names:
        raise UserError(
            "an adapter has no name",
            where="--adapter",
            expected="folders separated by commas, or 'none' for the base",
            got=repr(text),
        )
    return tuple(names)


def _gains(text: str, names: Sequence[str]) -> list[float]:
    if not text:
        return [1.0] * len(names)
    parts = text.split(",")
    try:
        gains = [float(part) for part in parts]
    except ValueError:
        gains = [math.nan]
    if not all(map(math.isfinite, gains)):
        raise UserError(
            "a weight is no number",
            where="--adapter_weights",
            expected="numbers separated by commas, such as 0.7,0.3",
            got=repr(text),
        )
    if len(gains) != len(names):
        raise UserError(
            "there are not as many weights as adapters",
            where="--adapter_weights",
            expected=f"{len(names)}, for --adapter={','.join(names) or '(none given)'}",
            got=f"{len(gains)}: {text}",
        )
    return gains


def _read(name: str, model: Decoder, check: Check) -> Adapter:
    folder = Path(name).expanduser()
    adapter = load_any(folder, find_sites(model), model.spec)
    check(adapter, name)
    return adapter


def _label(names: Sequence[str], gains: Sequence[float], rank: int) -> str:
    if not names:
        return ""
    parts = [
        name if gain == 1 else f"{gain:g} * {name}"
        for name, gain in zip(names, gains, strict=True)
    ]
    label = f"adapter{'s' if names[1:] else ''} {' + '.join(parts)}"
    return f"{label}, rank {rank}" if rank else label
