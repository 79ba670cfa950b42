"""Patterns over module names: `q_proj,v_proj`, `down_proj=8`; each must match."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from ftjax.errors import UserError


def split_list(text: str) -> list[str]:
    """Splits at commas that are not inside brackets.

    >>> split_list('q_proj,layers.[0,1].*v_proj')
    ['q_proj', 'layers.[0,1].*v_proj']
    """
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def patterns(text: str, key: str) -> list[str]:
    """The regexes of a list of targets; at least one."""
    found = split_list(text)
    if not found:
        raise UserError(
            "there is nothing to train",
            where=key,
            expected="all-linear, or names such as q_proj,v_proj",
            got=repr(text),
        )
    return found


def pairs(text: str, key: str, kind: type) -> dict[str, Any]:
    """'regex=value,...' as a dict; values of `kind`, numbers positive."""
    found: dict[str, Any] = {}
    for part in split_list(text):
        pattern, equals, value = part.rpartition("=")
        try:
            found[pattern] = kind(value)
            number = kind is not str
            bad = not equals or (number and not 0 < found[pattern] <= 1e30)
        except ValueError:
            bad = True
        if bad:
            raise UserError(
                "a pattern without a value",
                where=key,
                expected="regex=value, separated by commas"
                if kind is str
                else f"regex=positive {kind.__name__}, separated by commas",
                got=part,
            )
    return found


def matches(pattern: str, name: str) -> bool:
    """Whether a regex matches a module name or a dotted end of it, as in PEFT."""
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None


def first(values: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches."""
    return next((v for p, v in values.items() if matches(p, name)), default)


def each_matches(regexes: list[str], names: list[str], key: str) -> None:
    """Raises UserError where a regex is none, or matches no name."""
    counts = {}
    for pattern in regexes:
        try:
            counts[pattern] = sum(matches(pattern, name) for name in names)
        except re.error as error:
            raise UserError(
                "this is not a regular expression",
                where=key,
                got=f"{pattern!r}: {error}",
                fix="escape the character, or name the modules: q_proj,v_proj",
            ) from error
    lost = [pattern for pattern, count in counts.items() if not count]
    if lost:
        known = sorted({name.rsplit(".", 1)[-1] for name in names})
        near = [n for p in lost for n in difflib.get_close_matches(p, known, 2, 0.5)]
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise UserError(
            "a pattern matches no projection of this model",
            where=key,
            expected="every pattern to match; projections: " + ", ".join(known),
            got=", ".join(f"{p} ({c} matches)" for p, c in counts.items()),
            fix=hint + "norms and embeddings cannot be targets",
        )
