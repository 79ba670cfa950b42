"""Preference rows: which answer was chosen over which, or how one was rated.

The columns are TRL's: `prompt`, `chosen`, `rejected` (texts or message lists; without a
`prompt` it is what both sides begin with), `margin`; `prompt`, `completion`, `label`.
AutoTrain's `text` and `rejected_text`, LLaMA-Factory's `conversations` and
`instruction` with `chosen` and `rejected`, and its `kto_tag`, are mapped onto these. A
`system` column (the rules) may precede the prompt of any of them. Where both sides have
a score, equal ones are a tie.
"""

import math
from typing import Any

from ftjax.data import chat
from ftjax.data.schema import RATED_ANSWERS, RATINGS, history, refuse_tools
from ftjax.data.sources import Row
from ftjax.data.words import clip, quoted, type_name
from ftjax.errors import UserError

Messages = list[dict[str, Any]]
SIDES = (("chosen", "rejected"), ("text", "rejected_text"))
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
)
PROMPTS = ("prompt", "conversations", "instruction", "question")
USED = (*PROMPTS, "system", "input", "history")


def sides(values: dict[str, Any]) -> tuple[str, str] | None:
    """The columns of the better and the worse answer, or None where there are none."""
    given = {name for name, value in values.items() if value is not None}
    return next((pair for pair in SIDES if set(pair) <= given), None)


def half(values: dict[str, Any]) -> str | None:
    """The side that a row has without the other, `chosen` or `rejected`, or None."""
    given = {name for name, value in values.items() if value is not None}
    alone = given & set(SIDES[0])
    if len(alone) != 1 or given & {"completion", "messages", "text"}:
        return None
    return alone.pop()


def before(row: Row, side: str) -> Messages:
    """The messages before the answer of a half that has no column for its prompt.

    Raises:
      UserError: the half is a text, so nobody knows what it answers.
    """
    messages = _side(row, side)
    if not isinstance(messages, str):
        return messages[:-1]
    raise UserError(
        f"`{side}` alone does not say what it answers",
        where=row.where,
        expected="a `prompt`",
        got=f"columns {quoted(row.values)}",
        fix="add the prompt, or put both answers into one row",
    )


def rating(values: dict[str, Any]) -> str | None:
    """The column that says whether an answer is good, or None."""
    given = {name for name, value in values.items() if value is not None}
    if not any(set(columns) <= given for columns in RATED_ANSWERS):
        return None
    return next((name for name in RATINGS if name in given), None)


def scores(row: Row) -> tuple[str, ...]:
    """The columns with the scores of the better and the worse answer, if it has them.

    Raises:
      UserError: no finite numbers.
    """
    for columns in SCORES:
        if all(isinstance(row.values.get(name), int | float) for name in columns):
            for name in columns:
                _number(row, name)
            return columns
    return ()


def read_pair(row: Row, has_template: bool) -> tuple[Any, Any]:
    """(chosen, rejected) of a row, each (prompt, answer): both texts or both messages.

    Raises:
      UserError: sides of different types, or that answer different prompts.
    """
    columns = sides(row.values)
    if columns is None:
        raise ValueError(f"{row.where} is no pair")
    refuse_tools(row.values, row.where)
    chosen, rejected = (_side(row, name) for name in columns)
    prompt, system = _prompt(row, has_template), _system(row)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            prompt, chosen, rejected = _implicit_text(chosen, rejected)
            prompt = with_rules(system, prompt)
            return (prompt, chosen), (prompt, rejected)
        if isinstance(prompt, str) and not (system and has_template):
            prompt = with_rules(system, prompt)
            return (prompt, chosen), (prompt, rejected)
        chosen, rejected = says("assistant", chosen), says("assistant", rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        types = [type_name(row.values[name]) for name in columns]
        raise UserError(
            f"`{columns[0]}` and `{columns[1]}` must both be text or both be messages",
            where=row.where,
            got=" and ".join(types),
        )
    if isinstance(prompt, str):
        repeated = chosen[0].get("role") in ("user", "system")
        if repeated and prompt not in [turn.get("content") for turn in chosen]:
            raise UserError(
                "the prompt is none of the messages that both sides repeat",
                where=row.where,
                expected="a prompt that is among the messages, or answers alone",
                got=f"`prompt` {clip(prompt)}; messages that begin with "
                f"{clip(chosen[0].get('content'))}",
                fix="delete `prompt` where the messages are whole, or mend the row",
            )
        prompt = None if repeated else says("user", prompt)
    prompt, chosen, rejected = _share(prompt, chosen, rejected, row.where, columns)
    if system and (not prompt or prompt[0].get("role") != "system"):
        prompt = [*says("system", system), *prompt]
    return (prompt, chosen), (prompt, rejected)


def read_margin(row: Row) -> float:
    """By how much the chosen answer is better; 0 where the row does not say.

    Raises:
      UserError: no finite number.
    """
    if row.values.get("margin") is None:
        return 0.0
    return _number(row, "margin", "by how much the chosen answer is better, as 1.5")


def _number(row: Row, column: str, expected: str = "a number such as 1.5") -> float:
    value = row.values[column]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and abs(value) < 1e30 and math.isfinite(value):
        return float(value)
    raise UserError(
        f"column `{column}` holds no finite number",
        where=row.where,
        expected=expected,
        got=clip(value),
        fix="mend the row, or data.on_bad_row=skip",
    )


def read_label(row: Row, column: str) -> bool:
    """Whether the answer is a good one.

    Raises:
      UserError: neither true nor false (nor 1 or 0).
    """
    label = row.values[column]
    if isinstance(label, bool) or (isinstance(label, int | float) and label in (0, 1)):
        return bool(label)
    raise UserError(
        f"column `{column}` says neither true nor false",
        where=row.where,
        expected="true for a good answer, false for a bad one",
        got=clip(label),
    )


def rules_first(row: Row, has_template: bool) -> Row:
    """A row of `prompt` and `completion` whose `system` column is in its prompt."""
    values, system = dict(row.values), _system(row)
    prompt, completion = values.get("prompt"), values.get("completion")
    if not system or prompt is None:
        return row
    del values["system"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not has_template:
            return Row({**values, "prompt": with_rules(system, prompt)}, row.where)
        values["completion"] = says("assistant", completion)
        prompt = says("user", prompt)
    if isinstance(prompt, list):
        values["prompt"] = [*says("system", system), *prompt]
    return Row(values, row.where)


def no_pair(row: Row, rated: bool) -> UserError:
    """A row without a preference, or a rating, where the task needs one."""
    names = row.values
    fix = "rows like this one alone train with configs/sft.py or generic.py; beside "
    fix += "pairs, with configs/orpo.py"
    if set(RATINGS) & set(names) and not rated:
        fix = "answers that are rated one by one train with configs/kto.py"
    if nulls := [
        n for n in ("chosen", "rejected", *RATINGS) if names.get(n, 0) is None
    ]:
        fix = f"{quoted(nulls)} is null: mend the row, or data.on_bad_row=skip"
    expected = "; or ".join(quoted(pair) for pair in SIDES) + ", with a `prompt`"
    if rated:
        expected = f"`prompt`, `completion` and `label`; or {expected}"
    return UserError(
        "this task needs answers that are rated, or pairs"
        if rated
        else "this task needs pairs of a better and a worse answer",
        where=row.where,
        expected=expected,
        got=f"columns {quoted(names)}" if names else "an empty object",
        fix=fix,
    )


def _side(row: Row, column: str) -> str | Messages:
    value = row.values[column]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
        return [chat.from_share_gpt(message) for message in value]
    if isinstance(value, str):
        return value
    raise UserError(
        f"column `{column}` has the wrong type",
        where=row.where,
        expected="a text, or a list of messages",
        got="an empty list" if value == [] else f"{type_name(value)}: {clip(value)}",
    )


def _prompt(row: Row, has_template: bool) -> str | Messages | None:
    values = row.values
    for column in PROMPTS:
        value = values.get(column)
        if value is None:
            continue
        if isinstance(value, str):
            if column in ("instruction", "question"):
                return _instruction(value, row, has_template)
            return value
        if isinstance(value, list) and all(isinstance(m, dict) for m in value):
            return [chat.from_share_gpt(message) for message in value] or None
        raise UserError(
            f"column `{column}` has the wrong type",
            where=row.where,
            expected="a text, or a list of messages",
            got=f"{type_name(value)}: {clip(value)}",
        )
    return None


def _instruction(text: str, row: Row, has_template: bool) -> str | Messages:
    """As in supervised fine-tuning: a turn of the user, or a line of text."""
    if extra := row.values.get("input"):
        text = f"{text}\n{extra}"
    before = history(row.values, row.where)
    if before or has_template:
        return [*before, *says("user", text)]
    return text + "\n"


def _system(row: Row) -> str:
    system = row.values.get("system") or ""
    if isinstance(system, str):
        return system
    raise UserError(
        "column `system` has the wrong type",
        where=row.where,
        expected="text",
        got=f"{type_name(system)}: {clip(system)}",
    )


def with_rules(system: str, prompt: str) -> str:
    """A prompt in plain text, after the rules."""
    return f"{system}\n\n{prompt}" if system else prompt


def says(role: str, content: str) -> Messages:
    return [{"role": role, "content": content}]


def _share(
    prompt: Messages | None,
    chosen: Messages,
    rejected: Messages,
    where: str,
    columns: tuple[str, str],
) -> tuple[Messages, Messages, Messages]:
    """The prompt, and what each side says after it."""
    if prompt is not None:
        # Some data sets repeat the prompt in both sides.
        n = len(prompt)
        if chosen[:n] == prompt and rejected[:n] == prompt:
            chosen, rejected = chosen[n:], rejected[n:]
    else:
        shared = 0
        for a, b in zip(chosen, rejected, strict=False):
            if a != b:
                break
            shared += 1
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    first, second = (
        side[0].get("role") if side else None for side in (chosen, rejected)
    )
    if first != second or first in ("system", "user"):
        alone = "system" in (first, second) and first != second
        raise UserError(
            "only one side of a pair has a system message"
            if alone
            else "the two sides of a pair answer different prompts",
            where=where,
            expected=f"`{columns[0]}` and `{columns[1]}` with the same messages up to "
            "an answer of the assistant",
            got=f"{clip(chosen, 120)} and {clip(rejected, 120)}",
            fix="make the pair again, or data.on_bad_row=skip",
        )
    return prompt, chosen, rejected


def _implicit_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt is what both begin with, up to a space (as TRL finds it)."""
    both = list(zip(chosen, rejected, strict=False))
    # Where one begins with the other, both still have a last character of their own.
    last = max(len(both) - 1, 0)
    n = next((i for i, (a, b) in enumerate(both) if a != b), last)
    if n and chosen[n - 1] == " ":
        n -= 1
    return chosen[:n], chosen[n:], rejected[n:]


def checked(prompt: Messages, answer: Messages, where: str) -> Messages:
    """The conversation of a prompt and an answer, by the rules of `chat.check`."""
    return chat.check([*prompt, *answer], where, "prompt + answer")
