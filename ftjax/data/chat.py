"""Conversations: their rules, and which characters of a rendering are trained on."""

from dataclasses import dataclass, field
from typing import Any

from ftjax.data.template import Cut, RowFault
from ftjax.data.tokenizer import Tokenizer
from ftjax.data.words import (
    CONTENT_END,
    GENERATION_END,
    GENERATION_START,
    clip,
    type_name,
)
from ftjax.errors import UserError

ROLES = ("system", "user", "assistant")
SHARE_GPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "system": "system",
}


def from_share_gpt(turn: dict[str, Any]) -> dict[str, Any]:
    """A `from`/`value` turn as `role`/`content`; unknown roles keep their name."""
    if "from" not in turn:
        return turn
    role = turn["from"]
    role = SHARE_GPT_ROLES.get(role, role) if isinstance(role, str) else role
    rest = {k: v for k, v in turn.items() if k not in ("from", "value")}
    return {"role": role, "content": turn.get("value"), **rest}


def check(messages: Any, where: str, column: str) -> list[dict[str, Any]]:
    """Checks the form and order of messages and returns them, reduced to their text.

    The rules: an optional system message first, then user and assistant in turns,
    ending with the assistant.

    Raises:
      UserError: names the index of the message and the rule that it breaks.
    """
    if not isinstance(messages, list):
        raise UserError(
            f"column `{column}` has the wrong type",
            where=where,
            expected="a list of messages",
            got=type_name(messages),
        )
    if not messages:
        raise UserError(
            "a conversation is empty", where=where, expected="at least one message"
        )
    checked = [_message(m, f"{where}, message {i}") for i, m in enumerate(messages)]
    expected = "user"
    for i, message in enumerate(checked):
        role = message["role"]
        place = f"{where}, message {i}"
        if role == "system":
            if i > 0:
                raise _order(place, "a system message may only be the first", role)
            continue
        if role != expected:
            before = f"after `{checked[i - 1]['role']}`" if i else "first"
            raise _order(place, f"`{expected}` must come {before}", role)
        expected = "assistant" if role == "user" else "user"
    if checked[-1]["role"] != "assistant":
        place = f"{where}, message {len(checked) - 1}"
        raise _order(place, "the last message must be the assistant's", role)
    return checked


def _order(where: str, rule: str, role: str) -> UserError:
    return UserError(
        "the roles of a conversation are out of order",
        where=where,
        expected=rule,
        got=f"`{role}`",
        fix="mend the row, or data.on_bad_row=skip",
    )


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(
            "a message is not an object", where=where, got=type_name(message)
        )
    role, content = message.get("role"), message.get("content")
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise UserError(
                f"a message has `{key}`: text only",
                where=where,
                got=clip(message[key], 80),
                fix="drop the rows that use tools, or data.on_bad_row=skip",
            )
    if role in ("tool", "function", "observation", "function_call"):
        raise UserError(
            f"a message has the role `{role}`: text only",
            where=where,
            fix="drop the rows that use tools, or data.on_bad_row=skip",
        )
    if role not in ROLES:
        raise UserError(
            "a message has an unknown role",
            where=where,
            expected="`system`, `user` or `assistant`",
            got=clip(role) if role is not None else "no `role`",
        )
    if isinstance(content, list):
        raise UserError(
            "the content of a message is a list of parts: text only",
            where=where,
            expected="one text",
            got=clip(content, 80),
            fix="join the text parts, or data.on_bad_row=skip",
        )
    if not isinstance(content, str):
        raise UserError(
            "the content of a message has the wrong type",
            where=where,
            expected="text",
            got=type_name(content),
        )
    if any(c in content for c in (GENERATION_START, GENERATION_END, CONTENT_END)):
        raise UserError("a message holds U+FDD0 to U+FDD2, not characters", where=where)
    reasoning = message.get("reasoning_content")
    extra = {"reasoning_content": reasoning} if isinstance(reasoning, str) else {}
    return {"role": role, "content": content, **extra}


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
      text: the whole rendering.
      spans: the characters that are trained on, [start, end) per assistant turn.
      notes: what is odd about it, for the report.
    """

    text: str
    spans: list[tuple[int, int]]
    notes: list[str] = field(default_factory=list)


def render_all(
    rows: list[tuple[list[dict[str, Any]], str, int]], tokenizer: Tokenizer
) -> list[Rendered | UserError]:
    """Renders conversations and finds what the assistant wrote in each.

    The spans are the template's own `{% generation %}` blocks where it has them. Else
    a turn starts where the rendering of the messages before it, with the generation
    prompt, ends, and ends with the first special token after its content.

    Args:
      rows: (messages, where, index of the first message that may be trained on).
      tokenizer: gives the template and the special tokens.

    Raises:
      UserError: no template, or one that breaks the sandbox. A fault of a single row
        is returned in its place.
    """
    if not rows:
        return []
    template = tokenizer.require_template(rows[0][1])
    own_marks = template.marks_generation
    jobs = [(messages, _cuts(messages, own_marks)) for messages, _, _ in rows]
    found: list[Rendered | UserError] = []
    for (messages, where, first), texts in zip(
        rows, template.render(jobs), strict=True
    ):
        if isinstance(texts, RowFault):
            found.append(_refused(where, texts))
            continue
        try:
            find = _by_marks if own_marks else _by_prefixes
            found.append(find(messages, texts, where, first, tokenizer))
        except UserError as error:
            found.append(error)
    return found


def render_prompts(
    rows: list[tuple[Any, str]], tokenizer: Tokenizer
) -> list[str | UserError]:
    """Conversations up to where the assistant speaks; a row's fault in its place.

    Args:
      rows: (messages, where).
      tokenizer: gives the template.

    Raises:
      UserError: as `render_all`.
    """
    if not rows:
        return []
    template = tokenizer.require_template(rows[0][1])
    jobs = [(messages, [Cut(len(messages), prompt=True)]) for messages, _ in rows]
    found: list[str | UserError] = []
    for (_, where), texts in zip(rows, template.render(jobs), strict=True):
        if isinstance(texts, RowFault):
            found.append(_refused(where, texts))
        else:
            bare = texts[0].replace(GENERATION_START, "").replace(GENERATION_END, "")
            found.append(bare)
    return found


def _refused(where: str, fault: RowFault) -> UserError:
    return UserError(
        "the chat template refuses this conversation",
        where=where,
        got=clip(fault.error, 300),
    )


def _cuts(messages: list[dict[str, Any]], own_marks: bool) -> list[Cut]:
    whole = Cut(len(messages))
    if own_marks:
        return [whole]
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    prompts = [Cut(i, prompt=True) for i in turns]
    return [whole, Cut(len(messages), marked=True), *prompts]


def _by_marks(
    messages: list[dict[str, Any]],
    texts: list[str],
    where: str,
    first: int,
    tokenizer: Tokenizer,
) -> Rendered:
    """Spans from the template's `{% generation %}` blocks."""
    text, spans, start = "", [], 0
    for piece in _split(texts[0], GENERATION_START + GENERATION_END):
        if piece == GENERATION_START:
            start = len(text)
        elif piece == GENERATION_END:
            spans.append((start, len(text)))
        else:
            text += piece
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if len(spans) != len(turns):
        raise _self_check(
            f"{len(turns)} turns of the assistant, {len(spans)} generation blocks",
            where,
            text,
        )
    notes: list[str] = []
    _check_contents(messages, text, spans, where, notes)
    ending = _end_of_turn(text[spans[-1][1] :], tokenizer)
    for k, (start, end) in enumerate(spans):
        # A block that leaves out the end of turn would teach a model never to stop.
        if not tokenizer.special_pattern.search(text[start:end]):
            if ending and text.startswith(ending, end):
                spans[k] = (start, end + len(ending))
            elif k == len(spans) - 1:
                notes.append("no end-of-turn token after the assistant's words")
    kept = [span for i, span in zip(turns, spans, strict=True) if i >= first]
    return Rendered(text, kept, notes)


def _split(text: str, marks: str) -> list[str]:
    pieces, start = [], 0
    for i, char in enumerate(text):
        if char in marks:
            pieces += [text[start:i], char]
            start = i + 1
    return [*pieces, text[start:]]


def _by_prefixes(
    messages: list[dict[str, Any]],
    texts: list[str],
    where: str,
    first: int,
    tokenizer: Tokenizer,
) -> Rendered:
    """Spans from renderings of what comes before each turn, checked against the whole.

    A template may write a turn differently once others follow (some drop reasoning), so
    only the prompts must be prefixes of the whole; the end of each content is marked.
    """
    text, marked = texts[:2]
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    pieces = marked.split(CONTENT_END)
    if len(pieces) != len(turns) + 1 or "".join(pieces) != text:
        raise _self_check(
            f"{len(turns)} turns of the assistant, {len(pieces) - 1} in the rendering",
            where,
            text,
        )
    ending = _end_of_turn(pieces[-1], tokenizer)
    notes: list[str] = []
    spans, end = list[tuple[int, int]](), 0
    for k, piece in enumerate(pieces[:-1]):
        end += len(piece)
        start = _start(text, texts[2 + k], messages[: turns[k]], tokenizer, notes)
        if start is None or not (spans[-1][1] if spans else 0) <= start <= end:
            raise _self_check(
                f"the messages before message {turns[k]} are written differently "
                "once it follows",
                where,
                text,
            )
        stop = end + len(ending) if text.startswith(ending, end) else end
        spans.append((start, stop))
    if not tokenizer.special_pattern.search(ending):
        notes.append("no end-of-turn token after the assistant's words")
    _check_contents(messages, text, spans, where, notes)
    kept = [span for i, span in zip(turns, spans, strict=True) if i >= first]
    return Rendered(text, kept, notes)


def _end_of_turn(tail: str, tokenizer: Tokenizer) -> str:
    """What follows the last content, up to and including the first special token."""
    match = tokenizer.special_pattern.search(tail)
    return tail[: match.end()] if match else tail


def _start(
    text: str,
    prompt: str,
    before: list[dict[str, Any]],
    tokenizer: Tokenizer,
    notes: list[str],
) -> int | None:
    """Where a turn starts, or None where what comes before it is not a prefix."""
    if text.startswith(prompt):
        return len(prompt)
    plain = tokenizer.render(before, add_generation_prompt=False)
    if not text.startswith(plain):
        return None
    notes.append("the generation prompt differs from how the turn is written")
    shared = len(plain)
    limit = min(len(text), len(prompt))
    while shared < limit and text[shared] == prompt[shared]:
        shared += 1
    return shared


def _check_contents(
    messages: list[dict[str, Any]],
    text: str,
    spans: list[tuple[int, int]],
    where: str,
    notes: list[str],
) -> None:
    """Every message must be in the rendering, in its place."""
    turn, cursor = 0, 0
    for i, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] == "assistant":
            start, end = spans[turn]
            turn, cursor = turn + 1, end
            if content not in text[start:end]:
                notes.append("the chat template changes or shortens an answer")
        elif message["role"] == "system":
            if content not in text:
                raise _self_check(f"message {i} (system) is not in it", where, text)
        else:
            before = spans[turn][0] if turn < len(spans) else len(text)
            if text.find(content, cursor, before) < 0:
                raise _self_check(f"message {i} is not in its place", where, text)


def _self_check(got: str, where: str, text: str) -> UserError:
    return UserError(
        "the chat template drops, changes or reorders turns, so what the assistant "
        "wrote cannot be found",
        where=where,
        expected="every message written once, in order",
        got=f"{got}, in:\n{clip(text, 400)}",
        fix="in a copy of the template, mark the assistant's part with\n"
        "{% generation %}...{% endgeneration %} and name it with data.chat_template,\n"
        "or split the conversation",
    )
