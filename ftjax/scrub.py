"""What a page may say: no secret, and no folder of a machine, which may name people."""

import re
from pathlib import Path
from typing import Any

_SECRET_KEY = re.compile(
    r"(?i)(^|[_.-])(tokens?|passw(or)?d|secret|api_?key|credentials?)$"
)
_SECRET = re.compile(
    r"\b(hf_|sk-|gh[pousr]_|github_pat_|AKIA|glpat-|xox[abp]-)[A-Za-z0-9_-]{8,}"
)
_HOME = re.compile(r"(/(home|Users)/[^/]+|~\w*)/?")
_FOLDERS = re.compile(r"(?<![\w.~])(/|~\w*/)([^\s:/]+/)*")
_ABSOLUTE = re.compile(r"/|~\w*/|[A-Za-z]:[\\/]")
_HIDDEN = "(hidden)"


def scrubbed(value: Any, key: str = "") -> Any:
    """A config value that can be published: no secret, no folder of this machine."""
    if isinstance(value, dict):
        return {name: scrubbed(inner, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(inner, key) for inner in value]
    if not isinstance(value, str):
        return value
    if value and _SECRET_KEY.search(key):
        return _HIDDEN
    text = re.sub(r"(\w://)[^/\s@]+@", rf"\1{_HIDDEN}@", _SECRET.sub(_HIDDEN, value))
    if text == str(Path.home()) or _HOME.fullmatch(text):
        return "~"
    if _ABSOLUTE.match(text):
        return ".../" + re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return text


def scrubbed_text(text: str) -> str:
    """A text without the secrets and the absolute folders in it."""
    return _FOLDERS.sub(".../", _SECRET.sub(_HIDDEN, text))
