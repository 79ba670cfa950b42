"""Small helpers for messages about data: safe, short and precise."""

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Any

# Unicode noncharacters: no text may hold them, so they can mark places in one.
GENERATION_START, GENERATION_END, CONTENT_END = "\ufdd0", "\ufdd1", "\ufdd2"

_TYPE_NAMES = {
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def type_name(value: Any) -> str:
    """The JSON name of a value's type, as a reader of the file would say it."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def visible(text: str) -> str:
    """`text` with control and direction-changing characters written as escapes.

    Data may hold terminal escapes; printed raw they could rewrite the screen. Line
    breaks and tabs stay, and so do the joiners that emoji and some scripts need.
    """
    return "".join(c if _harmless(c) else _escape(c) for c in text)


def _harmless(char: str) -> bool:
    if char in "\n\t" or char == "\u200d" or char == "\u200c":
        return True
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs")


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def clip(value: Any, limit: int = 60) -> str:
    """One safe line that shows `value`, cut at `limit` characters."""
    text = value if isinstance(value, str) else repr(value)
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return visible(cut).replace("\n", "\\n").replace("\t", "\\t")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None where nothing is near."""
    found = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def quoted(names: Iterable[str]) -> str:
    """`a`, `b` and so on, for a list of column names in a message."""
    return ", ".join(f"`{clip(name, 40)}`" for name in names)
