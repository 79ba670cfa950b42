"""Reads a `config.json` key by key, remembering which keys were read.

Whatever changes the maths must be read by a family or refused by name; the keys that
nobody read are what `registry` looks at last.
"""

import sys
from typing import Any, NoReturn

from ftjax.errors import UserError

# Far above any published model; keeps a damaged number from becoming an allocation.
LARGEST = 2**31 - 1


def say(text: str) -> None:
    """Prints one remark for the user; on stderr, as stdout may be read by a machine."""
    print(f"note: {text}", file=sys.stderr)


class ConfigReader:
    """One model's configuration, as read from `where` (named in every error)."""

    def __init__(self, config: dict[str, Any], where: str):
        self.config, self.where = config, where
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`; `default` where it is absent or null."""
        self._read.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int, *, minimum: int = 1) -> int:
        """A whole number of at least `minimum`."""
        value = self.get(key, default)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not minimum <= value <= LARGEST:
            self.refuse(key, f"a whole number, {minimum} or more")
        return value

    def number(self, key: str, default: float, *, above: float = 0.0) -> float:
        """A finite number above `above`."""
        return finite(
            self.get(key, default), above, lambda want: self.refuse(key, want)
        )

    def flag(self, key: str, default: bool) -> bool:
        """True or false; nothing that merely looks like it."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def require(self, *keys: str) -> None:
        """Raises one error that names every key of `keys` that is absent or null."""
        missing = [key for key in keys if self.config.get(key) is None]
        if missing:
            raise UserError(
                f"the model configuration lacks {', '.join(missing)}",
                where=self.where,
                expected=f"a number for each of {', '.join(keys)}",
                got=f"keys: {', '.join(list(self.config)[:20]) or 'none'}",
                fix="take the config.json that was published with the weights",
            )

    def refuse(self, key: str, supported: str, fix: str | None = None) -> NoReturn:
        """Raises the error that names `key`, its value, and what is supported."""
        refuse_value(self.where, key, self.config.get(key), supported, fix)

    def unread(self) -> dict[str, Any]:
        """The keys that nobody has asked for."""
        return {k: v for k, v in self.config.items() if k not in self._read}


def refuse_value(
    where: str, key: str, value: Any, supported: str, fix: str | None = None
) -> NoReturn:
    """Raises a `UserError` for a configuration value that ftjax does not compute."""
    shown = repr(value)
    raise UserError(
        f"the model configuration sets {key}, in a way that ftjax does not support",
        where=f"{where}: {key}",
        expected=supported,
        got=shown if len(shown) <= 200 else shown[:200] + " ...",
        fix=fix or "use a model without it; ftjax never ignores what changes the maths",
    )


def finite(value: Any, above: float, refuse: Any) -> float:
    """`value` as a float, or `refuse(what is wanted)` where it is not one."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # The order matters: an integer may be too large to be a float.
    if not number or not above < value <= 1e30:
        refuse(f"a number above {above:g}")
    return float(value)
