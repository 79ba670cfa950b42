"""Rows that hold a prompt alone: what a model answers is judged, not imitated.

The column is TRL's `prompt`, text or messages. Of a row that was made to be imitated
(`prompt` and `completion`, `messages`, Alpaca, ShareGPT) the last answer is taken off
and becomes the column `completion`. Every other column is kept, for whoever judges.
"""

from typing import Any

from ftjax.data import chat
from ftjax.data.schema import (
    Conversation,
    PromptCompletion,
    PromptRow,
    normalise,
)
from ftjax.data.sources import Row
from ftjax.data.words import clip, quoted, type_name
from ftjax.errors import UserError

Columns = dict[str, Any]
TAKEN = ("prompts", "completions")  # what a judge is given under these names is ours


def read_prompt(row: Row, has_template: bool) -> tuple[PromptRow, str, Columns]:
    """(prompt, schema, what else the row says) of one row.

    Raises:
      UserError: no prompt, or one that is not for the assistant to answer.
    """
    values = row.values
    rest = {name: x for name, x in values.items() if name not in ("prompt", *TAKEN)}
    prompt = values.get("prompt")
    if prompt is not None:
        return PromptRow(_checked(prompt, row.where), row.where), "prompt", rest
    if not {"messages", "conversations", "instruction"} & values.keys():
        raise _no_prompt(row)
    found = normalise(row, has_template)
    sample = found.sample
    rest = {name: rest[name] for name in found.ignored if name in rest}
    if isinstance(sample, PromptCompletion):
        rest["completion"] = sample.completion
        return PromptRow(sample.prompt, row.where), found.schema, rest
    if isinstance(sample, Conversation):
        rest["completion"] = sample.messages[-1]["content"]
        return PromptRow(sample.messages[:-1], row.where), found.schema, rest
    raise _no_prompt(row)


def _checked(prompt: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise UserError(
            "column `prompt` has the wrong type",
            where=where,
            expected="a text, or a list of messages",
            got=f"{type_name(prompt)}: {clip(prompt)}",
        )
    turns = [chat.from_share_gpt(m) if isinstance(m, dict) else m for m in prompt]
    answered = [*turns, {"role": "assistant", "content": ""}]
    return chat.check(answered, where, "prompt")[:-1]


def _no_prompt(row: Row) -> UserError:
    return UserError(
        "this task needs prompts to answer",
        where=row.where,
        expected="`prompt`, a text or messages; or rows that a prompt is part of",
        got=f"columns {quoted(row.values)}" if row.values else "an empty object",
        fix="rename the column that holds the question to `prompt`",
    )
