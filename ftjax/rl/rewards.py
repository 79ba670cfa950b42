"""All rewards of a run on one scale: named, weighted, checked, summed."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftjax.data.words import clip
from ftjax.errors import EXIT_DIVERGED, UserError
from ftjax.rl.functions import WHERE, Reward, find_reward

Columns = dict[str, Any]
Ids = Sequence[int]
# (columns, prompts, answers, whether each ended by itself) -> scores
Scores = Callable[
    [Sequence[Columns], Sequence[Ids], Sequence[Ids], Sequence[bool]], np.ndarray
]
AUTO = "auto"  # the name of whatever reward is usual
MODEL = "model"  # the name of the reward model's reward
LARGEST = 1e15  # of a reward: beyond, its variance in float32 is none


@dataclass(frozen=True)
class Judged:
    """What n completions earn, float64.

    Attributes:
      total: [n], the weighted sum; NaN where nothing judges a completion.
      each: {name: [n]}; NaN where that reward does not judge one.
      bad: [n], whether a reward gave what is no finite number.
    """

    total: np.ndarray
    each: dict[str, np.ndarray]
    bad: np.ndarray


class Judge:
    """Gives every completion its reward.

    Args:
      config: `config.reward`.
      model: the scores of a reward model, or None; its weight is the last.

    Raises:
      UserError: a reward that is not there, or as many weights as there are rewards.
    """

    def __init__(self, config: Any, model: Scores | None = None):
        names = _names(config)
        self.functions = find_rewards(config)
        self.model, self.config = model, config
        self.names = [*names, *([MODEL] if model else [])]
        self.weights = _weights(config, self.names)

    def __call__(
        self,
        rows: Sequence[Columns],
        texts: Sequence[str],
        prompts: Sequence[Ids],
        answers: Sequence[Ids],
        stopped: Sequence[bool],
    ) -> Judged:
        """The rewards of some completions.

        Args:
          rows: the columns of each one's row, its `prompt` among them.
          texts: what each says.
          prompts: token ids.
          answers: token ids.
          stopped: whether each ended by itself.

        Raises:
          UserError: a function that fails or gives something else than a number per
            completion; more NaN than `config.max_nan` allows.
        """
        each: dict[str, Any] = {
            name: _called(name, function, rows, texts)
            for name, function in self.functions.items()
        }
        if self.model is not None:
            found = self.model(rows, prompts, answers, stopped)
            each[MODEL] = found.astype(np.float64)
        absent = np.array([[x is None for x in column] for column in each.values()])
        table = np.array(
            [[math.nan if x is None else x for x in column] for column in each.values()]
        )
        bad = (~np.isfinite(table) & ~absent).any(0)
        self._check_bad(bad, each, texts)
        table[:, bad] = math.nan
        total = np.nansum(table * np.array(self.weights)[:, None], axis=0)
        total += np.where(stopped, 0.0, self.config.unfinished)
        total[np.isnan(table).all(0)] = math.nan
        return Judged(total, dict(zip(each, table, strict=True)), bad)

    def _check_bad(
        self, bad: np.ndarray, each: dict[str, Any], texts: Sequence[str]
    ) -> None:
        if bad.mean() <= self.config.max_nan:
            return
        at = int(bad.argmax())
        given = {name: column[at] for name, column in each.items()}
        raise UserError(
            "a reward is no finite number",
            where=WHERE if self.functions else "config.reward.model",
            expected="a finite number, or None where a reward does not apply; at most "
            f"config.reward.max_nan={self.config.max_nan} of them may be no number",
            got=f"{given} for {clip(texts[at], 80)!r}; {int(bad.sum())} of {len(bad)} "
            "completions have none",
            fix="mend the reward, or raise config.reward.max_nan: such completions "
            "are then left out, and counted",
            code=EXIT_DIVERGED,
        )


def find_rewards(config: Any) -> dict[str, Reward]:
    """The functions of `config.reward` by their names.

    Raises:
      UserError: one that is not there.
    """
    return {name: find_reward(name, config) for name in _names(config)}


def told(config: Any) -> str:
    """What a completion earns, for people."""
    names = [*_names(config), *([MODEL] if config.model else [])]
    shown = {MODEL: f"the reward model {clip(config.model, 100)}"}
    weights = zip(_weights(config, names), names, strict=True)
    parts = [f"{weight:g} x {shown.get(name, name)}" for weight, name in weights]
    if config.unfinished:
        parts.append(f"{config.unfinished:g} where it was cut")
    return "reward: " + " + ".join(parts)


def _names(config: Any) -> list[str]:
    if config.function.strip() == AUTO:
        return [] if config.model else ["length"]
    return [name.strip() for name in config.function.split(",") if name.strip()]


def _called(
    name: str, function: Reward, rows: Sequence[Columns], texts: Sequence[str]
) -> list[float | None]:
    """A function's rewards, checked."""
    # What it is given is its own: it may change it, and the data stays as it is.
    own = [copy.deepcopy(row) for row in rows]
    names = dict.fromkeys(column for row in own for column in row)
    columns = {c: [row.get(c) for row in own] for c in names if c != "prompt"}
    prompts = [row["prompt"] for row in own]
    given = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    try:
        found = function(prompts=prompts, completions=given, **columns)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(
            "the reward function failed",
            where=f"{WHERE}={name}",
            got=f"{type(error).__name__}: {_shown(error)}",
            fix="--debug shows where; it is called as "
            f"f(prompts=, completions=, {', '.join(f'{c}=' for c in columns)})"[:200],
        ) from error
    is_list = isinstance(found, list | tuple) or (
        isinstance(found, np.ndarray) and found.ndim == 1
    )
    values = list(found) if is_list else None
    if values is None or len(values) != len(texts) or not all(map(_judges, values)):
        raise UserError(
            "the reward function gives something else than rewards",
            where=f"{WHERE}={name}",
            expected=f"a list of {len(texts)} numbers, one per completion",
            got=_shown(found) if values is None else f"{len(values)}: {_shown(found)}",
        )
    return [None if x is None else _number(x) for x in values]


def _judges(value: Any) -> bool:
    real = isinstance(value, int | float | np.integer | np.floating | np.bool_)
    return value is None or (real and not isinstance(value, np.timedelta64))


def _shown(value: Any) -> str:
    """A stranger's object as one line; it may fail at that too."""
    try:
        return clip(str(value), 300)
    except Exception as error:
        return f"(its text fails: {type(error).__name__})"


def _number(value: Any) -> float:
    """A reward as a float; NaN where its square is beyond float32."""
    return float(value) if abs(value) < LARGEST else math.nan


def _weights(config: Any, names: list[str]) -> list[float]:
    parts = config.weights.split(",") if config.weights.strip() else []
    try:
        weights = [float(part) for part in parts] or [1.0] * len(names)
    except ValueError:
        weights = []
    good = len(weights) == len(names) and all(map(math.isfinite, weights))
    if names and good and len(set(names)) == len(names):
        return weights
    raise UserError(
        "a run needs a reward, and every reward its own weight",
        where="config.reward.function, config.reward.model, config.reward.weights",
        expected="such as function=length,words weights=1,0.5; the model's is the last",
        got=f"rewards {', '.join(names) or 'none'}; weights={config.weights or 'none'}",
    )
