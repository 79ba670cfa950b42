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

from ftjax.checkpoints.peft import Adapter, load_adapter
from ftjax.checkpoints.peft_others import Adapter as OtherAdapter
from ftjax.checkpoints.peft_others import is_other, load_any
from ftjax.errors import UserError
from ftjax.methods.lora import LoraPlan, lora_axes
from ftjax.methods.several import Update, combine
from ftjax.models.proj import Path as SitePath
from ftjax.models.proj import Site
from ftjax.models.spec import ModelSpec
from ftjax.sharding import shard_tree

NONE = "none"
Known = Mapping[str, Adapter | None]  # by the name that was asked for, in order
Check = Callable[[Adapter, str], None]


@dataclass(frozen=True)
class Chosen:
    """Adapters that were read, and their sum.

    Attributes:
      names: as they were asked for; `NONE` is the base.
      lora: the sum, float32 on the host; None where it changes nothing.
      plan: of the sum.
      label: for people, such as 'adapter A'; empty where nothing was asked for.
      known: all that were read, by name.
    """

    names: tuple[str, ...]
    lora: Any
    plan: LoraPlan | None
    label: str
    known: Known

    def variables(self, mesh: Mesh) -> dict[str, Any]:
        """{'lora': ...} on its devices; empty where the sum changes nothing."""
        if self.plan is None:
            return {}
        places = shard_tree(self.lora, lora_axes(self.plan), mesh)
        return {"lora": jax.device_put(self.lora, places)}


def read_adapters(
    text: str,
    weights: str = "",
    rank: int = 0,
    *,
    sites: Mapping[SitePath, Site],
    check: Check,
    known: Known | None = None,
) -> Chosen:
    """Reads what `--adapter`, `--adapter_weights` and `--adapter_rank` say.

    Args:
      text: see `names_of`.
      weights: numbers, as many; all 1 if empty.
      rank: of the sum, or 0: see `several.combine`.
      sites: of the model.
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
            read[name] = None if name == NONE else _read(name, sites, check)
    label = _label(names, gains, rank)
    if len(names) == 1 and gains == [1] and not rank:
        adapter = read[names[0]]
        plan = adapter.plan if adapter else None
        return Chosen(names, adapter and adapter.lora, plan, label, read)
    lora, plan = combine(updates(read, names), gains, rank) or (None, None)
    return Chosen(names, lora, plan, label, read)


def read_other(
    text: str, sites: Mapping[SitePath, Site], spec: ModelSpec
) -> OtherAdapter | None:
    """An adapter that is no low-rank update, where `--adapter` names one such folder.

    Raises:
      UserError: if it stands among others: only low-rank updates add up.
    """
    names = [name for name in names_of(text) if name != NONE]
    other = [name for name in names if is_other(Path(name).expanduser())]
    if not other:
        return None
    if names[1:]:
        raise UserError(
            "only low-rank adapters can be used together",
            where=f"--adapter={text}",
            got=f"{other[0]} is of another kind",
        )
    return load_any(Path(other[0]).expanduser(), sites, spec)


def updates(known: Known, names: Sequence[str]) -> list[Update | None]:
    found = [known[name] for name in names]
    return [Update(one.lora, one.plan) if one else None for one in found]


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


def _read(name: str, sites: Mapping[SitePath, Site], check: Check) -> Adapter:
    adapter = load_adapter(Path(name).expanduser(), sites)
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
