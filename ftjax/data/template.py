"""The chat template of a tokenizer, rendered under limits in a child process."""

import importlib.util
import json
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ftjax.data.words import clip
from ftjax.errors import UserError

MAX_TEMPLATE_CHARS = 1_000_000
MAX_OUTPUT_CHARS = 1_000_000  # on top of 20 times the length of the messages
MAX_MEMORY_BYTES = 1 << 30
MAX_PROCESSOR_SECONDS = 2
MAX_WALL_SECONDS = 120.0

Messages = list[dict[str, Any]]

_ROOT = str(Path(__file__).resolve().parents[2])
_CHILD = (
    f"import sys; sys.path.append({_ROOT!r})\n"
    "from ftjax.data.worker import main; main()"
)


@dataclass(frozen=True)
class Cut:
    """One rendering of a conversation.

    Args:
      count: how many of its messages to render, from the first.
      prompt: whether to add the generation prompt.
      marked: whether to write CONTENT_END where an assistant's content ends.
    """

    count: int
    prompt: bool = False
    marked: bool = False


@dataclass(frozen=True)
class RowFault:
    """The template refused one conversation, in its own words."""

    error: str


class ChatTemplate:
    """Renders messages as the model's tokenizer says they are written.

    Args:
      source: the Jinja text.
      names: the special tokens that it may name (`bos_token`, `eos_token`).
      where: where the template came from, for messages.

    Raises:
      UserError: from `render`, where the template breaks a rule of the sandbox or a
        limit: these are faults of the template, never of one row.
    """

    def __init__(self, source: str, names: dict[str, str], where: str):
        if len(source) > MAX_TEMPLATE_CHARS:
            raise UserError(
                "the chat template is too large",
                where=where,
                expected=f"at most {MAX_TEMPLATE_CHARS:,} characters",
                got=f"{len(source):,}",
            )
        self.source, self.where, self._names = source, where, names
        self.marks_generation = bool(re.search(r"{%[-+]?\s*generation\b", source))
        self.tells_date = "strftime_now" in source
        self._child: subprocess.Popen[str] | None = None

    def render(
        self, jobs: Sequence[tuple[Messages, list[Cut]]]
    ) -> list[list[str] | RowFault]:
        """Renders each conversation once per cut, in order."""
        if not jobs:
            return []
        child = self._child or self._start()
        assert child.stdin is not None
        batch = [
            {
                "messages": messages,
                "cuts": [(cut.count, cut.prompt, cut.marked) for cut in cuts],
            }
            for messages, cuts in jobs
        ]
        timer = threading.Timer(MAX_WALL_SECONDS, child.kill)
        timer.start()
        try:
            child.stdin.write(json.dumps(batch) + "\n")
            child.stdin.flush()
            return [self._reply(child, messages) for messages, _ in jobs]
        except BrokenPipeError:
            raise self._ended(child, []) from None
        finally:
            timer.cancel()

    def close(self) -> None:
        """Ends the child, if there is one; a later call starts another."""
        if self._child is not None:
            _end(self._child)
            self._child = None

    def _start(self) -> "subprocess.Popen[str]":
        if importlib.util.find_spec("jinja2") is None:
            raise UserError("chat templates need jinja2", fix="pip install jinja2")
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            # Ctrl-C is for the run, which may still want to render a sample.
            start_new_session=True,
        )
        weakref.finalize(self, _end, child)
        assert child.stdin is not None
        setup = {
            "template": self.source,
            "names": self._names,
            "memory": MAX_MEMORY_BYTES,
            "seconds": MAX_PROCESSOR_SECONDS,
            "output": MAX_OUTPUT_CHARS,
        }
        child.stdin.write(json.dumps(setup) + "\n")
        child.stdin.flush()
        self._reply(child, [])
        self._child = child
        return child

    def _reply(
        self, child: "subprocess.Popen[str]", messages: Messages
    ) -> list[str] | RowFault:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise self._ended(child, messages)
        reply = json.loads(line)
        if "texts" in reply:
            return reply["texts"]
        if reply["kind"] == "row":
            return RowFault(reply["error"])
        self.close()
        if reply["kind"] == "syntax":
            raise UserError(
                "the chat template is not valid Jinja",
                where=self.where,
                got=clip(reply["error"], 300),
                fix="mend the template, or name another with data.chat_template",
            )
        raise self._refused(reply["error"], messages)

    def _ended(self, child: "subprocess.Popen[str]", messages: Messages) -> UserError:
        code = child.wait()
        self._child = None
        why = f"its process ended (exit {code})"
        if code in (-24, -9):  # SIGXCPU, or SIGKILL by the watchdog
            why = f"it ran longer than {MAX_PROCESSOR_SECONDS} s"
        return self._refused(why, messages)

    def _refused(self, why: str, messages: Messages) -> UserError:
        if messages:
            why += f"; at the row that begins {clip(messages[0]['content'])!r}"
        return UserError(
            "the chat template was stopped by the sandbox",
            where=self.where,
            expected=f"a template that needs at most {MAX_PROCESSOR_SECONDS} s and "
            f"{MAX_MEMORY_BYTES >> 20} MiB for one conversation, no code and no files",
            got=clip(why, 300),
            fix="do not trust this template: name another with data.chat_template",
        )


def _end(child: "subprocess.Popen[str]") -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        _close_quietly(pipe)


def _close_quietly(pipe: IO[str] | None) -> None:
    if pipe is not None:
        try:
            pipe.close()
        except BrokenPipeError:  # the child was ended before it read everything
            return
