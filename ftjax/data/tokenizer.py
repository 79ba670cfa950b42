"""A fast tokenizer read from local files, and the chat template that goes with it."""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ftjax.data.template import ChatTemplate, Cut, RowFault
from ftjax.data.words import (
    CONTENT_END,
    GENERATION_END,
    GENERATION_START,
    clip,
)
from ftjax.errors import UserError

PLAIN = "plain"  # the name of the template that ships
LARGEST = 2**31 - 1  # of an id
PATH_KEYS = ("tokenizer_file", "vocab_file", "merges_file", "chat_template_file")
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Tokenizer:
    """Text to ids and back.

    Attributes:
      path: the directory that it was read from.
      vocab_size: the number of its ids, added tokens included.
      bos_id, eos_id, pad: ids, or None where the tokenizer has none. Nothing here masks
        by id, so `pad` may be absent or equal to `eos_id`.
      template: its chat template, or None.
    """

    def __init__(self, hf: Any, path: Path, template_source: str, where: str):
        self.path = path
        self._hf = hf
        self._fast = hf.backend_tokenizer
        self._fast.no_truncation()
        self._fast.no_padding()
        self.vocab_size = len(hf)
        self.bos_id: int | None = hf.bos_token_id
        self.eos_id: int | None = hf.eos_token_id
        self.pad: int | None = hf.pad_token_id
        self.bos_text: str = hf.bos_token or ""
        self.eos_text: str = hf.eos_token or ""
        added = self._fast.get_added_tokens_decoder()
        self.special_ids = {i: t.content for i, t in added.items() if t.special}
        for i, text in ((self.bos_id, self.bos_text), (self.eos_id, self.eos_text)):
            if i is not None:
                self.special_ids[i] = text
        names = {"bos_token": self.bos_text, "eos_token": self.eos_text}
        for name in ("pad_token", "unk_token"):
            names[name] = getattr(hf, name) or ""
        self.template = (
            ChatTemplate(template_source, names, where) if template_source else None
        )

    def encode(self, texts: Sequence[str], add_special: bool) -> list[list[int]]:
        """Ids of each text, with what the tokenizer adds at both ends if asked."""
        rows = self._fast.encode_batch_fast(list(texts), add_special_tokens=add_special)
        return [row.ids for row in rows]

    def encode_spans(
        self, texts: Sequence[str], add_special: bool = False
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """As `encode`, with the characters that each id came from."""
        rows = self._fast.encode_batch(list(texts), add_special_tokens=add_special)
        return [(row.ids, row.offsets) for row in rows]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of some ids."""
        return self._hf.decode(
            [int(i) for i in ids],
            skip_special_tokens=skip_special,
            clean_up_tokenization_spaces=False,
        )

    def render(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The messages as the chat template writes them. Raises UserError."""
        template = self.require_template("messages")
        cut = Cut(len(messages), prompt=add_generation_prompt)
        [reply] = template.render([(messages, [cut])])
        if isinstance(reply, RowFault):
            raise UserError(
                "the chat template refuses these messages",
                where=template.where,
                got=clip(reply.error, 300),
            )
        return reply[0].replace(GENERATION_START, "").replace(GENERATION_END, "")

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt in plain text, as they begin a row in training."""
        ids = self.encode([text], add_special=True)[0]
        return self.single_bos(ids[: len(ids) - len(self.added[1])])

    def single_bos(self, ids: list[int]) -> list[int]:
        """Without the second BOS of a text that began with one itself."""
        bos = self.added[0]
        return ids[len(bos) :] if bos and ids[: 2 * len(bos)] == bos * 2 else ids

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids of a prompt in chat form, up to where the assistant speaks."""
        return self.encode([self.render(messages)], add_special=False)[0]

    def fingerprint(self) -> str:
        """A hash of what every id stands for."""
        ids = sorted(self._hf.get_vocab().items())
        return hashlib.blake2b(repr(ids).encode(), digest_size=16).hexdigest()

    @property
    def template_hash(self) -> str:
        """Of the text of its chat template; empty where it has none."""
        text = self.template.source if self.template is not None else ""
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest() if text else ""

    def require_template(self, where: str) -> ChatTemplate:
        """The chat template, or a UserError that names the ways out."""
        if self.template is None:
            raise UserError(
                "rows are conversations, but the tokenizer has no chat template",
                where=where,
                expected=f"chat_template.jinja or `chat_template` in {self.path}",
                fix="data.chat_template=plain (it ships with ftjax) or a Jinja file, "
                "a model whose\ntokenizer has one, or rows of strings: `prompt` and "
                "`completion`, or `text`",
            )
        return self.template

    @cached_property
    def added(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer itself puts before and after a text."""
        plain, full = (self.encode(["a"], add)[0] for add in (False, True))
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return [], []

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches the text of any special token."""
        texts = sorted(set(self.special_ids.values()) - {""}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer, by the tokenizer, the model or the template."""
        found = [] if self.eos_id is None else [self.eos_id]
        for name in ("generation_config.json", "config.json"):
            ids = _read_json(self.path / name).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            for i in ids:
                if not isinstance(i, int) or isinstance(i, bool) or i > LARGEST:
                    raise UserError(
                        "what ends a text is no token id",
                        where=f"{self.path / name}: eos_token_id",
                        expected="an id, a list of ids, or null",
                        got=clip(i, 100),
                    )
            found += ids
        if self.template is not None:
            found += self._end_of_turn()
        return tuple(dict.fromkeys(found))

    def _end_of_turn(self) -> list[int]:
        talk = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
        assert self.template is not None
        [reply] = self.template.render([(talk, [Cut(2, marked=True)])])
        if isinstance(reply, RowFault):
            return []
        tail = reply[0].rpartition(CONTENT_END)[2]
        match = self.special_pattern.search(tail)
        by_text = {text: i for i, text in self.special_ids.items()}
        return [by_text[match.group()]] if match else []


def load_tokenizer(path: str | Path, chat_template: str = "") -> Tokenizer:
    """Reads a tokenizer from a directory; runs no code that lies there.

    Args:
      path: a directory in the Hugging Face layout, usually the model's.
      chat_template: a Jinja file to use instead of the directory's own template, or
        'plain': the one that ships.

    Raises:
      UserError: nothing there, damaged, or it wants to run code of its own.
    """
    folder = Path(path)
    if not any((folder / name).is_file() for name in FILES):
        raise UserError(
            "there is no tokenizer here",
            where=folder,
            expected="tokenizer.json (and tokenizer_config.json)",
            got="no such directory" if not folder.is_dir() else "none of its files",
            fix="copy the tokenizer files of the model into this directory",
        )
    _refuse_code(folder)
    hf = _from_transformers(folder)
    source, where = _template_source(hf, folder, chat_template)
    return Tokenizer(hf, folder, source, where)


def _refuse_code(folder: Path) -> None:
    config = _read_json(folder / "tokenizer_config.json")
    maps = {"tokenizer_config.json": config.get("auto_map")}
    model_map = _read_json(folder / "config.json").get("auto_map")
    if isinstance(model_map, dict) and "AutoTokenizer" in model_map:
        maps["config.json"] = model_map
    for name, auto_map in maps.items():
        if auto_map:
            raise UserError(
                "this tokenizer wants to run Python code of its own (`auto_map`)",
                where=folder / name,
                got=clip(auto_map, 120),
                fix="save it once as a fast tokenizer (tokenizer.json) in a place "
                "that you trust;\nftjax never runs code from a model directory",
            )
    for key in PATH_KEYS:
        value = config.get(key)
        if isinstance(value, str) and (
            Path(value).is_absolute() or ".." in Path(value).parts
        ):
            raise UserError(
                f"`{key}` points outside the tokenizer's directory",
                where=folder / "tokenizer_config.json",
                got=clip(value, 120),
                fix=f"delete `{key}`: the files are found by their usual names",
            )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            "this file is not valid JSON",
            where=path,
            got=clip(error, 120),
            fix="download it again",
        ) from error
    return value if isinstance(value, dict) else {}


def _from_transformers(folder: Path) -> Any:
    # Slow to import, hence here: configs and checks of columns do without it.
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, use_fast=True, local_files_only=True
        )
    # transformers and tokenizers raise whatever comes up, bare Exception included.
    except Exception as error:
        raise UserError(
            "the tokenizer cannot be read",
            where=folder,
            got=clip(f"{type(error).__name__}: {error}", 300),
            fix="the directory needs a whole tokenizer.json; download it again",
        ) from error
    if not getattr(hf, "is_fast", False):
        raise UserError(
            "this tokenizer has no fast form",
            where=folder,
            expected="tokenizer.json",
            got=type(hf).__name__,
            fix="save it once with transformers as a fast tokenizer",
        )
    return hf


def _template_source(hf: Any, folder: Path, chosen: str) -> tuple[str, str]:
    if chosen == PLAIN:
        return _plain_source(hf), f"the template '{PLAIN}'"
    if chosen:
        try:
            return Path(chosen).read_text(encoding="utf-8"), chosen
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                "the file of data.chat_template cannot be read",
                where=chosen,
                got=clip(error, 200),
                expected="a UTF-8 text file with a Jinja template",
            ) from error
    own = folder / "chat_template.jinja"
    where = str(own if own.is_file() else folder / "tokenizer_config.json")
    source = hf.chat_template
    if isinstance(source, dict):
        source = {str(name): text for name, text in source.items()}
        if "default" not in source:
            raise UserError(
                "the tokenizer has several chat templates, but none is the default",
                where=where,
                expected="one named `default`",
                got=clip(", ".join(sorted(source)), 200),
                fix="name the file of one with data.chat_template",
            )
        source = source["default"]
    source = "" if source is None else source
    if not isinstance(source, str) or not _encodes(source):
        raise UserError(
            "the chat template is no text",
            where=where,
            expected="a Jinja template, in UTF-8",
            got=clip(repr(source), 100),
            fix="name a file with data.chat_template",
        )
    return source, where


def _plain_source(hf: Any) -> str:
    """The template that ships; it begins as the tokenizer begins its texts."""
    body = Path(__file__).with_name("plain.jinja").read_text(encoding="utf-8")
    begins = hf.bos_token_id is not None and hf("a").input_ids[0] == hf.bos_token_id
    return ("{{- bos_token -}}\n" if begins else "") + body


def _encodes(text: str) -> bool:
    """Whether it can be written to a file: JSON may hold half a surrogate pair."""
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False
