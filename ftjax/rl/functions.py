"""Rewards that are programs: the built-in ones, and the user's own.

A reward is `f(prompts, completions, **columns)` and gives one number per completion, as
TRL calls it: prompts as the data has them, completions as texts or, where the prompt is
messages, as a list of one message. Columns are lists too. None says that it does not
judge a completion.
"""

import importlib
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from ftjax.errors import UserError

Reward = Callable[..., Any]
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
WHERE = "config.reward.function"


def find_reward(name: str, config: Any) -> Reward:
    """A built-in reward, or `module:function`.

    Args:
      name: of one; see `BUILT_IN`.
      config: `config.reward`, which has the settings of the built-in ones.

    Raises:
      UserError: there is no such reward, or its settings are missing.
    """
    if name in BUILT_IN:
        return BUILT_IN[name](config)
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise UserError(
            "there is no such reward",
            where=WHERE,
            expected=", ".join(BUILT_IN) + ", or module:function of your own",
            got=repr(name),
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # whatever the module does as it loads
        raise UserError(
            "the reward function cannot be imported",
            where=f"{WHERE}={name}",
            expected=f"{module}.py in this folder, or an installed module, that "
            f"defines {function}(prompts, completions, **columns)",
            got=f"{type(error).__name__}: {error}",
        ) from error
    if not callable(found):
        raise UserError(
            "the reward is no function", where=f"{WHERE}={name}", got=repr(found)[:100]
        )
    return found


def text_of(completion: Any) -> str:
    """What a completion says."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def last_number(text: str) -> Decimal | None:
    """The number of a text: what follows '####' if that is there, else the last."""
    found = _NUMBER.findall(text.rpartition("####")[2] if "####" in text else text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _exact_match(config: Any) -> Reward:
    """1 where the last number is that of the column `answer` (or `completion`)."""

    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        right = columns.get("answer") or columns.get("completion")
        if right is None:
            raise UserError(
                "the reward has nothing to compare an answer with",
                where=f"{WHERE}=exact_match",
                expected="rows with `answer` (or `completion`), such as '... #### 42'",
                got="columns " + (", ".join(columns) or "none"),
            )
        goals = [None if goal is None else last_number(str(goal)) for goal in right]
        return [
            None if goal is None else float(last_number(text_of(given)) == goal)
            for given, goal in zip(completions, goals, strict=True)
        ]

    return reward


def _length(config: Any) -> Reward:
    """1 for an answer of `config.words_wanted` words; else the smaller number over the
    larger one, so that there is a way to learn it from everywhere."""

    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        goal = config.words_wanted
        counts = [len(words_of(text_of(given))) for given in completions]
        return [min(n, goal) / max(n, goal) for n in counts]

    return reward


def _format(config: Any) -> Reward:
    """1 where the whole answer, but for spaces around it, matches `config.pattern`."""
    if not config.pattern:
        raise _unset("format", "pattern", r"'.*\.' (a text that ends with a full stop)")
    try:
        pattern = re.compile(config.pattern, re.DOTALL)
    except re.error as error:
        raise UserError(
            "the pattern is no regular expression",
            where="config.reward.pattern",
            got=f"{config.pattern!r}: {error}",
        ) from error

    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        texts = (text_of(given).strip() for given in completions)
        return [float(pattern.fullmatch(text) is not None) for text in texts]

    return reward


def _words(config: Any) -> Reward:
    """The share of the words of `config.words` that occur in the answer."""
    wanted = set(words_of(config.words))
    if not wanted:
        raise _unset("words", "words", "'happy,friend'")

    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        found = (wanted & set(words_of(text_of(given))) for given in completions)
        return [len(words) / len(wanted) for words in found]

    return reward


def _unset(reward: str, key: str, example: str) -> UserError:
    return UserError(
        f"the reward `{reward}` needs a setting",
        where=f"config.reward.{key}",
        expected=f"such as --config.reward.{key}={example}",
        got="nothing",
    )


BUILT_IN: dict[str, Callable[[Any], Reward]] = {
    "exact_match": _exact_match,
    "length": _length,
    "format": _format,
    "words": _words,
}
