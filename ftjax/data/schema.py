"""Columns to meaning: which part of a row is read, and which part is learned.

The columns are TRL's: `text`; `prompt` and `completion` (strings or message lists);
`messages`; pre-tokenised `input_ids` (and `labels`). Alpaca, ShareGPT and AutoTrain
columns are mapped onto these.
"""

from dataclasses import dataclass
from typing import Any

from ftjax.data import chat
from ftjax.data.sources import Row
from ftjax.data.turn_weights import Weights, turn_weights
from ftjax.data.words import clip, nearest, quoted, type_name
from ftjax.errors import UserError

SCHEMAS = {
    "text": ("text",),
    "prompt/completion": ("prompt", "completion"),
    "messages": ("messages",),
    "Alpaca": ("instruction", "output"),
    "ShareGPT": ("conversations",),
    "pre-tokenised": ("input_ids",),
}
OPTIONAL = {
    "Alpaca": ("input", "system", "history"),
    "ShareGPT": ("system", "tools"),
    "messages": ("tools",),
    "pre-tokenised": ("labels",),
    "AutoTrain": (),
}
RATINGS = ("label", "kto_tag")  # columns that say whether an answer is good
RATED_ANSWERS = tuple(SCHEMAS[s] for s in SCHEMAS if s not in ("text", "pre-tokenised"))
IGNORE = -100  # the label of a token that is not trained on, in pre-tokenised rows


@dataclass(frozen=True)
class TextRow:
    """Plain text; every token after the first is trained on."""

    text: str
    where: str


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt and the completion that is trained on."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Conversation:
    """Messages of `role` and `content`; trained on are answers from `train_from` on.

    `weights`: how much each message counts; None: 1.
    """

    messages: list[dict[str, Any]]
    where: str
    train_from: int = 0
    weights: Weights | None = None


@dataclass(frozen=True)
class TokenRow:
    """Token ids made elsewhere, and which of them are trained on."""

    ids: list[int]
    trained: list[bool]
    where: str


@dataclass(frozen=True)
class PromptRow:
    """A prompt that is to be answered: a text, or messages up to the user's last."""

    prompt: str | list[dict[str, Any]]
    where: str


Sample = TextRow | PromptCompletion | Conversation | TokenRow | PromptRow


@dataclass(frozen=True)
class Normalised:
    """A sample, the schema that it was read by, and the columns that were not used.

    `identical`: the row is a pair whose chosen and rejected text are the same.
    """

    sample: Sample
    schema: str
    ignored: tuple[str, ...]
    identical: bool = False


def normalise(row: Row, has_template: bool = True) -> Normalised:
    """Reads a row by its columns.

    Args:
      row: as it came from the source.
      has_template: whether conversations can be rendered; without a template a plain
        Alpaca row becomes prompt and completion.

    Raises:
      UserError: columns missing, of the wrong type, or of another task.
    """
    values = row.values
    schema = _schema(values, row.where)
    sample: Sample
    if schema == "pre-tokenised":
        sample = _token_row(values, row.where)
    elif schema == "prompt/completion":
        sample = _prompt_completion(values, row.where)
    elif schema == "messages":
        refuse_tools(values, row.where)
        sample = _conversation(values["messages"], row.where, "messages")
    elif schema == "ShareGPT":
        refuse_tools(values, row.where)
        sample = _share_gpt(values, row.where)
    elif schema == "Alpaca":
        sample = _alpaca(values, row.where, has_template)
    else:
        sample = TextRow(_text(values, "text", row.where), row.where)
    used = (*SCHEMAS.get(schema, ("text",)), *OPTIONAL.get(schema, ()))
    identical = schema == "AutoTrain" and values["text"] == values.get("rejected_text")
    ignored = tuple(k for k in values if k not in used)
    return Normalised(sample, schema, ignored, identical)


def _schema(values: dict[str, Any], where: str) -> str:
    """The name of the schema that a row's columns follow."""
    # Columnar files fill absent cells with null: a null column is not there, unless it
    # is all that a schema has.
    names = {k for k, v in values.items() if v is not None} or set(values)
    if {"chosen", "rejected"} & names:
        raise _preference(values, where)
    rated = [name for name in RATINGS if isinstance(values.get(name), bool)]
    if rated and any(set(columns) <= names for columns in RATED_ANSWERS):
        raise UserError(
            f"these are good and bad answers (`{rated[0]}`), not answers to imitate",
            where=where,
            got=f"columns {quoted(values)}",
            fix=f"train on them with configs/kto.py; or keep the rows whose "
            f"`{rated[0]}` is true and delete that column",
        )
    for schema in (
        "pre-tokenised",
        "prompt/completion",
        "messages",
        "ShareGPT",
        "Alpaca",
    ):
        if set(SCHEMAS[schema]) <= names:
            return schema
    if "text" in names:
        return "AutoTrain" if {"prompt", "rejected_text"} & names else "text"
    # Present but null: let the reading of the cell say so.
    for schema, needed in SCHEMAS.items():
        if set(needed) <= set(values):
            return schema
    raise _missing(values, where)


def _preference(values: dict[str, Any], where: str) -> UserError:
    return UserError(
        "these are preference rows; supervised fine-tuning has one answer to imitate",
        where=where,
        expected="`prompt` and `completion`, `messages`, or `text`",
        got=f"columns {quoted(values)}",
        fix="to compare the answers, use --config=configs/dpo.py, orpo.py, reward.py, "
        "...; to imitate\nthe chosen ones, rename `chosen` to `completion` and delete "
        "`rejected`",
    )


def _missing(values: dict[str, Any], where: str) -> UserError:
    """Names the schema that lacks least, and the column that was probably meant."""
    lacking = {s: [c for c in need if c not in values] for s, need in SCHEMAS.items()}

    def distance(schema: str) -> tuple[int, int]:
        lack = lacking[schema]
        near = [c for c in lack if nearest(c, values)]
        return (len(lack) - len(near), -len(SCHEMAS[schema]))

    best = min(lacking, key=distance)
    meant = {c: nearest(c, values) for c in lacking[best]}
    hints = [f"rename `{clip(n)}` to `{c}`" for c, n in meant.items() if n]
    partly = len(lacking[best]) < len(SCHEMAS[best]) or hints
    what = (
        f"column {quoted(lacking[best])} is missing" if partly else "no known columns"
    )
    return UserError(
        what,
        where=where,
        expected="; or ".join(quoted(need) for need in SCHEMAS.values()),
        got=f"columns {quoted(values)}" if values else "an empty object",
        fix="did you mean: " + ", ".join(hints) + "?"
        if hints
        else "rename the columns, or convert the rows",
    )


def _text(values: dict[str, Any], column: str, where: str) -> str:
    value = values.get(column)
    if isinstance(value, str):
        return value
    raise UserError(
        f"column `{column}` has the wrong type",
        where=where,
        expected="text",
        got=type_name(value) if value is None else f"{type_name(value)}: {clip(value)}",
    )


def _prompt_completion(values: dict[str, Any], where: str) -> Sample:
    prompt, completion = values["prompt"], values["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        refuse_tools(values, where)
        return PromptCompletion(
            _text(values, "prompt", where), _text(values, "completion", where), where
        )
    refuse_tools(values, where)
    for column in ("prompt", "completion"):
        if not isinstance(values[column], list):
            raise UserError(
                "`prompt` and `completion` must both be text or both be messages",
                where=where,
                got=f"`{column}` is {type_name(values[column])}",
            )
    both = prompt + completion
    found = _conversation(both, where, "prompt + completion", len(prompt))
    if any(m["role"] == "assistant" for m in found.messages[len(prompt) :]):
        return found
    raise UserError(
        "`completion` holds no message of the assistant",
        where=where,
        got=clip(completion, 120),
    )


def refuse_tools(values: dict[str, Any], where: str) -> None:
    if values.get("tools"):
        raise UserError(
            "rows with `tools` are not supported: text only",
            where=where,
            got=clip(values["tools"], 80),
            fix="drop the rows that use tools, or data.on_bad_row=skip",
        )


def _share_gpt(values: dict[str, Any], where: str) -> Conversation:
    system = values.get("system")
    head = [{"role": "system", "content": system}] if system else []
    turns = values["conversations"]
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        turns = [chat.from_share_gpt(t) if isinstance(t, dict) else t for t in turns]
        turns = head + turns
    return _conversation(turns, where, "conversations")


def _conversation(
    messages: Any, where: str, column: str, train_from: int = 0
) -> Conversation:
    checked = chat.check(messages, where, column)
    return Conversation(checked, where, train_from, turn_weights(messages, where))


def _alpaca(values: dict[str, Any], where: str, has_template: bool) -> Sample:
    instruction = _text(values, "instruction", where)
    output = _text(values, "output", where)
    extra = values.get("input")
    if extra:
        instruction = f"{instruction}\n{_text(values, 'input', where)}"
    system, before = values.get("system"), history(values, where)
    if not has_template and not system and not before:
        return PromptCompletion(instruction + "\n", output, where)
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    messages += before
    messages.append({"role": "user", "content": instruction})
    messages.append({"role": "assistant", "content": output})
    first = len(messages) - 2
    checked = chat.check(messages, where, "instruction, history, output")
    return Conversation(checked, where, train_from=first)


def history(values: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The turns before an Alpaca row's instruction, as messages.

    Raises:
      UserError: no list of pairs.
    """
    pairs = values.get("history") or []
    messages: list[dict[str, Any]] = []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(
                "column `history` has the wrong type",
                where=where,
                expected="a list of [instruction, answer] pairs",
                got=clip(pairs),
            )
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    return messages


def _token_row(values: dict[str, Any], where: str) -> TokenRow:
    ids = _id_list(values, "input_ids", where)
    if values.get("labels") is None:
        return TokenRow(ids, [True] * len(ids), where)
    labels = _id_list(values, "labels", where)
    if len(labels) != len(ids):
        raise UserError(
            "`labels` and `input_ids` differ in length",
            where=where,
            got=f"{len(labels)} labels for {len(ids)} ids",
        )
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (IGNORE, token):
            raise UserError(
                "a label is neither its own token nor -100",
                where=f"{where}, labels[{place}]",
                expected=f"{token} (labels are not shifted) or {IGNORE}",
                got=str(label),
            )
    return TokenRow(ids, [label != IGNORE for label in labels], where)


def _id_list(values: dict[str, Any], column: str, where: str) -> list[int]:
    ids = values[column]
    if not isinstance(ids, list):
        raise UserError(
            f"column `{column}` has the wrong type",
            where=where,
            expected="a list of whole numbers",
            got=type_name(ids),
        )
    for place, value in enumerate(ids):
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(
                f"column `{column}` holds what is no token id",
                where=f"{where}, {column}[{place}]",
                expected="a whole number",
                got=clip(value),
            )
    return ids
