"""Other adapters on a policy that is open: the base stays where it is."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from ftjax.adapters import NONE, names_of, read_adapters, updates
from ftjax.checkpoints.peft_others import KINDS, Adapter
from ftjax.console import say
from ftjax.decoding.generator import Generator
from ftjax.errors import UserError
from ftjax.loading import Note
from ftjax.methods.several import stack
from ftjax.policy import Policy, check_adapter
from ftjax.sharding import make_mesh, shard_tree

RUN = "run"  # in a chat: what the run itself has learned


def with_adapter(
    policy: Policy,
    adapter: str,
    weights: str = "",
    rank: int = 0,
    *,
    mesh: Mesh | None = None,
    note: Note = say,
) -> Policy:
    """The policy with another adapter, or the sum of some, instead of its own.

    Args:
      policy: a base, with or without an adapter; its arrays are shared.
      adapter: a folder, several, or 'none'; one that the policy has read is not read
        again.
      weights: as in --adapter_weights.
      rank: as in --adapter_rank.
      mesh: that the policy is on; of all devices if None.
      note: told what is worth knowing.

    Raises:
      UserError: as `open_policy`.
    """
    _require_plain_base(policy)
    chosen = read_adapters(
        adapter,
        weights,
        rank,
        model=policy.model,
        check=partial(check_adapter, policy.base, note),
        known=policy.adapters,
    )
    updates(chosen.known, chosen.names)  # refuses what cannot be switched
    base = {n: tree for n, tree in policy.variables.items() if n not in KINDS}
    return replace(
        policy,
        variables={**base, **chosen.variables(make_mesh() if mesh is None else mesh)},
        plan=chosen.plan,
        label=f"{chosen.label} on {policy.base.name}",
        step=None,
        adapters=chosen.known,
    )


def _require_plain_base(policy: Policy) -> None:
    """Another adapter needs the weights that it was trained on."""
    own = policy.step is not None and policy.plan is None
    if own or policy.origin is not None:
        raise UserError(
            "an adapter belongs to the model that it was trained on",
            where="/adapter",
            got=policy.label
            + (": it has weights of its own" if own else ": its base is taken apart"),
            fix="open the base: --model, with the adapter/ of such a run if you like",
        )
    if policy.saved:
        raise UserError(
            "another adapter would stand on weights that were trained with this one",
            where="/adapter",
            got=f"{policy.label}, which has its own {min(policy.saved)}",
            fix="open the base with the other: --model, --adapter",
        )


def each_row_its_own(
    policy: Policy, names: Sequence[str], *, mesh: Mesh | None = None
) -> Policy:
    """The policy with all of these adapters at once: see `weights.choose`.

    Args:
      policy: that has read them.
      names: choice k is `names[k]`; 'none' is the base.
      mesh: that the policy is on; of all devices if None.
    """
    lora, axes = stack(updates({NONE: None, **policy.adapters}, names))
    places = shard_tree(lora, axes, make_mesh() if mesh is None else mesh)
    variables = {**policy.variables, "lora": jax.device_put(lora, places)}
    label = f"adapters {', '.join(names)} on {policy.base.name}"
    return replace(policy, variables=variables, plan=None, label=label)


def chosen_alone(base: Policy, name: str, *, mesh: Mesh, note: Note = say) -> Policy:
    """One adapter, of any kind, on a base that is open without one.

    Args:
      base: its arrays are shared.
      name: a folder, or 'none'.
      mesh: that the base is on.
      note: told what is worth knowing.
    """
    check = partial(check_adapter, base.base, note)
    chosen = read_adapters(name, model=base.model, check=check, known=base.adapters)
    most = base.base.spec.max_positions
    return replace(
        base,
        variables=chosen.over(base.variables, base.base.spec, mesh),
        plan=chosen.plan,
        label=f"{chosen.label} on {base.base.name}",
        max_positions=most - (chosen.adapter.virtual if chosen.adapter else 0),
    )


class Switch:
    """The chat's commands: `/adapters` lists, `/adapter NAME` takes another.

    NAME is one of the list, by its path or its last part, or a new folder; several are
    separated by commas.

    Args:
      policy: what the generator was made from.
      generator: with its update `apart`.
      current: the adapter that it has, as --adapter says; empty: what the policy has.
    """

    def __init__(self, policy: Policy, generator: Generator, current: str = ""):
        known = {NONE: None, **policy.adapters}
        if policy.plan is not None and not current:
            lora = policy.variables["lora"]
            own = Adapter("lora", lora, policy.plan, policy.base.name, None)
            current, known[RUN] = RUN, own
        self._policy = replace(policy, adapters=known)
        self._generator, self._current = generator, current or NONE

    def __call__(self, line: str) -> bool:
        """Does what a line says, where it is a command; says whether it was one."""
        command, _, rest = line.strip().partition(" ")
        if command == "/adapters" or line.strip() == "/adapter":
            self._list()
        elif command == "/adapter":
            try:
                self._take(rest.strip())
            except UserError as error:
                say(error.screen())
        else:
            return False
        return True

    def _list(self) -> None:
        used = names_of(self._current)
        for name in self._policy.adapters:
            say(f"{'*' if name in used else ' '} {name}")

    def _take(self, text: str) -> None:
        asked = ",".join(map(self._named, names_of(text)))
        self._policy = with_adapter(self._policy, asked)
        self._generator.adapt(self._policy.variables.get("lora"))
        self._current = asked
        say(self._policy.label)

    def _named(self, name: str) -> str:
        """The one on the list that this means, else the name itself."""
        known = self._policy.adapters
        short = [full for full in known if Path(full).name == name]
        return short[0] if name not in known and len(short) == 1 else name


def parse_use(
    text: str,
    names: Sequence[str],
    prompts: int | None = None,
    *,
    summed: bool = False,
) -> list[int]:
    """Which adapter each prompt uses, or which are used in turn: `--use=0,1,0`.

    Args:
      text: the numbers.
      names: of the adapters.
      prompts: how many there are; None where none are.
      summed: whether a sum of the adapters was asked for too.

    Raises:
      UserError: not one for each prompt, or not one of the adapters.
    """
    if summed:
        raise UserError(
            "one adapter would be used at a time, and the sum of all",
            where="--use, --adapter_weights, --adapter_rank",
            fix="leave out --use, or the other two",
        )
    parts = [part.strip() for part in text.split(",")]
    listed = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
    for part in parts:
        if not part.isdecimal() or int(part) >= len(names):
            raise UserError(
                "the adapter to use is not there",
                where="--use",
                expected=listed or "--adapter=DIR,DIR beside it",
                got=part or repr(text),
            )
    if prompts is not None and len(parts) != prompts:
        raise UserError(
            "there are not as many uses as prompts",
            where="--use",
            expected=f"{prompts}, one for each prompt, of {listed}",
            got=f"{len(parts)}: {text}",
        )
    return [int(part) for part in parts]
