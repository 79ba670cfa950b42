"""From a docstring to its English: paragraphs of prose, one line each.

Docstrings mix prose with signatures, doctests, tables and reStructuredText markup. What
is kept here reads as sentences; what does not is dropped rather than mended.
"""

import inspect
import re
from itertools import pairwise

_SIGNATURE = re.compile(r"[A-Za-z_][\w.]*(?=\()")
# What follows `f(x) -> int` on its line: " -- text", ". Text", ", text of three words".
_ARROW_TAIL = re.compile(
    r" (?:--|-|—) +|\. +(?=[A-Z])|, (?=[a-z]+ [a-z]+ [a-z])"
    r"|-> (?=an? [a-z-]+ [a-z]+ [a-z])"
)
_NAMED = re.compile(r"(?:\(\))?(?:: +| +--? +)")
_BULLET = re.compile(r"(?:[*+-]|\(?\d{1,2}[.)])\s+(?=\S)")
_TERM = re.compile(r"(\*{0,2}[a-z_]\w*)(?: *: *[\w.\[\], ]{0,40})?")
_DEFINED = re.compile(r"(\*{0,2}[a-z_]\w*)(?: +--?|:) +(?=\S)")
_LABEL = re.compile(r"[A-Z][\w ]{2,24}:")
_BOILERPLATE = re.compile(r"Copyright|gencodec")
_RULE = re.compile(r"[=\-*~^#_+]{3,}")
_FIELD = re.compile(r":\w+[^:`]{0,40}:(\s|$)|@\w+|\.\. ")
_CODE = re.compile(
    r">>>|::=|\$ | -+> |^\s*import [\w.]+$|^\s*from [\w.]+ import |^\s*%"
    r"|^\s*(?:def|class|for|while|if|elif|else|try|with)\b[^.]*:$",
    re.M,
)
_CODE_WORD = re.compile(r"[=<>{}\[\]|\\/@#$%^~]|\w\(.|_\w+_|\w\.\w+\.|\d{3}")
_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")
_START = re.compile(
    r"[\"'`*(]{0,2}[A-Z]|[\"'`*][a-z_]"
    r"|[a-z_]\w* (?:is|are|may|can|must|gives|specifies|should|will|has|if|does)\b"
)
_END = re.compile(r"[.!?:][\"')]*$")
_COMMON_WORDS = """
    a all an and any are as at be between but by can each for from has have
    if in into is it its may must no not of on only or should so than that
    the their then there this to until used when where which will with you
    your
"""
_COMMON = frozenset(_COMMON_WORDS.split())
_MARKUP = (
    (re.compile(r":[a-z:]+:`[~!]?([^`]+)`"), r"`\1`"),
    (re.compile(r"``([^`]+)``"), r"`\1`"),
    (re.compile(r"(?<!\w)`([^`'\s]+)'"), r"`\1`"),
    (re.compile(r"::$"), ":"),
    (re.compile(r"\[\d+\]_?"), ""),
    (re.compile(r" +([,.;:])(?= |$)"), r"\1"),
    (re.compile(r"[“”]"), '"'),
    (re.compile("[‘’]"), "'"),
)


def paragraphs(doc: str, name: str = "") -> tuple[bool, list[str]]:
    """The prose of a docstring.

    Args:
      doc: the docstring, indented as it is in its source.
      name: the name of what it documents; cut where the docstring opens with it.

    Returns:
      Whether the docstring's own first paragraph is among them (then it is the first),
      and the paragraphs, each on one line with single spaces and a full stop.
    """
    text = strip_signatures(inspect.cleandoc(doc.expandtabs()))
    if name and text.startswith(name):
        named = _NAMED.match(text[len(name) :])
        text = text[len(name) + named.end() :] if named else text
    raw = [block.rstrip() for block in re.split(r"\n\s*\n", text) if block.strip()]
    kept: list[tuple[str, bool]] = []
    first = False
    for i, block in enumerate(raw):
        if i and raw[i - 1].endswith("::") and block[:1] == " ":
            raw[i] = block + "\n::"  # the next block may belong to the literal one too
            continue
        for part, item in _parts(block):
            clean = _sentence(part, opening=not i)
            if clean:
                first = first or not i
                kept.append((clean, item))
    whole = [_whole(*pair) for pair in pairwise([*kept, ("", False)])]
    return first and bool(whole[0]), [text for text in whole if text]


def strip_signatures(text: str) -> str:
    """Cuts the call signatures that stand before a docstring's first sentence."""
    while match := _SIGNATURE.match(text):
        depth, end = 0, match.end()
        for end in range(match.end(), len(text)):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            if not depth:
                break
        rest = text[end + 1 :]
        arrow = re.match(r" *-> *[^\n]*", rest)
        dash = re.match(r" *(?:--?|:|—)\s+", rest)
        if arrow:
            tail = _ARROW_TAIL.search(arrow[0])
            rest = rest[tail.end() if tail else arrow.end() :]
        elif dash:
            rest = rest[dash.end() :]
        elif rest.strip() and not re.match(r":?\s*\n", rest):
            return text
        text = inspect.cleandoc(rest.lstrip(":")).lstrip()
    return text


def _parts(block: str) -> list[tuple[str, bool]]:
    """The paragraphs of a block, and whether each is an item of a list.

    Bullets, `name -- meaning` lines and terms above an indented meaning are items.
    """
    lines = [line for line in block.split("\n") if not _RULE.fullmatch(line.strip())]
    if not lines or (len(lines) == 1 and "\n" in block):
        return []  # a heading and its underline
    if any(re.search(r"\S {3,}\S", line) for line in lines):
        return []  # a table, or aligned columns
    if len(lines) > 1 and _LABEL.fullmatch(lines[0].strip()):
        lines = lines[1:]
    base = len(lines[0]) - len(lines[0].lstrip())
    parts: list[tuple[list[str], bool]] = []
    for i, line in enumerate(lines):
        stripped = line.strip()
        deeper = len(line) - len(line.lstrip()) > base + 1
        follows = i + 1 < len(lines) and lines[i + 1].startswith(" " * (base + 2))
        if bullet := _BULLET.match(stripped):
            parts.append(([stripped[bullet.end() :]], True))
        elif not deeper and follows and (term := _TERM.fullmatch(stripped)):
            parts.append(([f"`{term[1]}`:"], True))
        elif not deeper and (defined := _DEFINED.match(stripped)):
            parts.append(([f"`{defined[1]}`: {stripped[defined.end() :]}"], True))
        elif not parts:
            parts.append(([stripped], False))
        elif deeper and not parts[-1][1]:
            return []  # an outline: its layout is its meaning
        else:
            parts[-1][0].append(stripped)
    return [("\n".join(part), item) for part, item in parts]


def _sentence(part: str, *, opening: bool) -> str:
    """The paragraph on one line, or "" where it does not read as English."""
    if _CODE.search(part) or _FIELD.match(part):
        return ""
    text = " ".join(re.sub(r"(?<=\w)-\n\s*(?=\w)", "-", part).split())
    for pattern, new in _MARKUP:
        text = pattern.sub(new, text)
    words, tokens = _WORD.findall(text), text.split()
    ended = bool(_END.search(text))
    if opening and tokens and tokens[0].isalpha() and len(words) > 2:
        text = text[0].upper() + text[1:]
    if len(words) < (3 - ended if opening else 4) or len(tokens) > 260:
        return ""
    if not _START.match(text) or text.isupper() or _BOILERPLATE.search(text):
        return ""
    if text.count("(") != text.count(")") or text.count("`") % 2:
        return ""
    plain = sum(c.isalpha() or c in " ,.'\"`*-" for c in text) / len(text)
    code = sum(bool(_CODE_WORD.search(token)) for token in tokens) / len(tokens)
    common = sum(word.lower() in _COMMON for word in words) / len(words)
    if plain < 0.88 or code > 0.2 or (len(words) > 9 and common < 0.08):
        return ""
    if ended:
        return text
    sentence = len(words) > 4 and common >= 0.15 and words[-1] not in _COMMON
    sentence = opening or (sentence and words[-1] != "meaning")
    return text + "." if sentence and re.search(r"[\w`)\"']$", text) else ""


def _whole(this: tuple[str, bool], after: tuple[str, bool]) -> str:
    """Cuts a last sentence that announces something which was not kept."""
    text = this[0]
    if not text.endswith(":") or (after[1] and not this[1]):
        return text
    end = max(text.rfind(mark) for mark in (". ", "? ", "! ", '." '))
    return text[: end + 1] if end > 10 else ""
