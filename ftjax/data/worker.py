"""Renders chat templates in a process of its own, under hard limits.

A chat template comes with a model and is a program by a stranger. Jinja's sandbox keeps
it from code and files but not from endless loops or huge strings, so the template is
compiled and rendered here, in one long-lived child with limits on memory and processor
time. The parent side is `template.py`.

Protocol: one JSON object a line. The first line sets the template and the limits; each
later one holds a list of jobs, and every job is answered by one line.
"""

import contextlib
import datetime
import json
import resource
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from jinja2 import Template, TemplateSyntaxError, Undefined, nodes
from jinja2.exceptions import SecurityError, UndefinedError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ftjax.data.words import CONTENT_END, GENERATION_END, GENERATION_START

# The same day on every day, so that a resumed run reads the same tokens; it is the day
# that the Llama 3 templates fall back to.
TODAY = datetime.datetime(2024, 7, 26)

ALLOWED_GLOBALS = ("range", "dict", "namespace")
FOREIGN_NODES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class RefusedError(Exception):
    """A template that asks for what the sandbox forbids."""


class RowError(Exception):
    """A template's own `raise_exception`."""


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (
            nodes.Output([nodes.TemplateData(mark)], lineno=line)
            for mark in (GENERATION_START, GENERATION_END)
        )
        return [start, *body, end]


class LoudUndefined(Undefined):
    """May be tested, compared and looped over, but printing it is an error.

    Templates test for absent keys all the time; printing one as empty text would lose
    data without a word.
    """

    def __str__(self) -> str:
        self._fail_with_undefined_error()

    __html__ = __str__


def _raise_exception(message: Any) -> NoReturn:
    raise RowError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def compile_template(source: str) -> Template:
    """Parses, checks and compiles a template. Raises RefusedError or TemplateError."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=LoudUndefined,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    _check(env.parse(source))
    env.globals = {k: v for k, v in env.globals.items() if k in ALLOWED_GLOBALS}
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = TODAY.strftime
    env.filters["tojson"] = _to_json
    return env.from_string(source)


def _check(tree: nodes.Template) -> None:
    for node in tree.find_all(FOREIGN_NODES):
        kind = type(node).__name__.lower()
        raise RefusedError(f"line {node.lineno}: `{kind}` reads another template")
    for get in tree.find_all(nodes.Getattr):
        if get.attr.startswith("_"):
            raise RefusedError(
                f"line {get.lineno}: `{get.attr}` reads Python's insides"
            )
    for item in tree.find_all(nodes.Getitem):
        key = item.arg.value if isinstance(item.arg, nodes.Const) else ""
        if isinstance(key, str) and key.startswith("__"):
            raise RefusedError(f"line {item.lineno}: `{key}` reads Python's insides")
    for name in tree.find_all(nodes.Name):
        if name.name in ("lipsum", "cycler", "joiner"):
            raise RefusedError(f"line {name.lineno}: `{name.name}` is not allowed")


def render(
    template: Template, names: dict[str, Any], job: dict[str, Any], limit: int
) -> list[str]:
    """Renders a job's messages once per cut.

    Args:
      template: the compiled template.
      names: what the template may use besides the messages (the special tokens).
      job: `messages`, and `cuts`: a list of [how many messages to render, whether to
        add the generation prompt, whether to mark where assistant contents end].
      limit: the longest text a template may write beyond 20 times its input.
    """
    messages = job["messages"]
    size = sum(len(m["content"]) for m in messages)
    texts = []
    for count, prompt, marked in job["cuts"]:
        shown = [_mark(m) if marked else m for m in messages[:count]]
        text = template.render(
            messages=shown,
            add_generation_prompt=prompt,
            tools=None,
            documents=None,
            **names,
        )
        if len(text) > limit + 20 * size:
            raise RefusedError(f"it wrote {len(text):,} characters for {size:,}")
        texts.append(text)
    return texts


def _mark(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] != "assistant":
        return message
    content = message["content"]
    # Before trailing white space, so that a template that trims it trims no mark.
    body = content.rstrip()
    return {**message, "content": body + CONTENT_END + content[len(body) :]}


def answer(work: Callable[[], list[str]]) -> dict[str, Any]:
    """Does the work and returns its texts, or what went wrong and of which kind."""
    try:
        return {"texts": work()}
    except (RefusedError, SecurityError) as error:
        return {"kind": "refused", "error": str(error)}
    except (MemoryError, OverflowError):
        return {"kind": "refused", "error": "it asked for too much memory"}
    except RecursionError:
        return {"kind": "refused", "error": "it is nested too deeply"}
    except TemplateSyntaxError as error:
        return {"kind": "syntax", "error": f"line {error.lineno}: {error.message}"}
    except RowError as error:
        return {"kind": "row", "error": str(error)}
    except UndefinedError as error:
        return {"kind": "row", "error": f"it uses what is not there: {error}"}
    # A stranger's program may raise anything; none of it may end this process.
    except Exception as error:
        return {"kind": "row", "error": f"{type(error).__name__}: {error}"}


def _limit_processor(seconds: int) -> None:
    """Allows `seconds` more of processor time; the kernel ends the process after."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds + 1, hard))


def main() -> None:
    """Serves jobs from standard input until it closes."""
    setup = json.loads(sys.stdin.readline())
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    # macOS has the name of this limit but not the limit.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (setup["memory"], hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_processor(setup["seconds"])
    compiled: list[Template] = []

    def compile_it() -> list[str]:
        compiled.append(compile_template(setup["template"]))
        return []

    print(json.dumps(answer(compile_it)), flush=True)
    if not compiled:
        return
    for line in sys.stdin:
        for job in json.loads(line):
            _limit_processor(setup["seconds"])
            reply = answer(
                lambda job=job: render(  # type: ignore[misc]
                    compiled[0], setup["names"], job, setup["output"]
                )
            )
            print(json.dumps(reply), flush=True)
