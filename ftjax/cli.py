"""What every command shares: its flags, its one line of JSON, its exit code.

A command is `main(args)`, which prints for people and returns what `--json` prints for
programs. Nothing heavy is imported here: a mistyped flag is found at once.
"""

import contextlib
import difflib
import importlib.util
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags

from ftjax.errors import UserError, run_entry
from ftjax.names import NAMES

Args = flags.FlagValues
Define = Callable[[Args], None]
Main = Callable[[Args], dict[str, Any] | None]

# What others have among their settings.
FLAGS = [ours.key for ours in NAMES.values() if ours.key.startswith("--")]
_ILLEGAL = re.compile(r"flag --([\w.]+)=(.*?): (.*)", re.DOTALL)


def entry(main: Main, define: Define | None = None, *, config: bool = False) -> None:
    """Runs `main` on the command line and ends the process with its exit code."""
    sys.exit(run(main, sys.argv[1:], define, config=config))


def run(
    main: Main, argv: list[str], define: Define | None = None, *, config: bool = False
) -> int:
    """Parses `argv`, runs `main(args)`, and returns the exit code.

    Args:
      main: prints for people; the dict that it returns is the one line of `--json`.
        With `--json`, all that is printed on the way goes to stderr.
      argv: without the program's name.
      define: defines the command's own flags, `flag_values=` its argument.
      config: also takes `--config=FILE.py[:ARGS]` and `--config.KEY=VALUE`; then
        `args.config` is a locked `ConfigDict`, or None where no file was named.
    """

    def parsed(argv: list[str]) -> None:
        args = parse(argv, define, config=config, help_text=_help_text(main))
        if args is None:
            return
        # Said by a library at import, to those who do not use torch.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        with _stdout_to_stderr(args.json):
            result = main(args)
        if args.json and result is not None:
            print(json.dumps(result), flush=True)

    return run_entry(parsed, argv)


def parse(
    argv: list[str],
    define: Define | None = None,
    *,
    config: bool = False,
    help_text: str = "",
) -> Args | None:
    """The flags of a command line; None where `--help` was asked for, and printed.

    Raises:
      UserError: an unknown flag or key, a value of the wrong kind, a stray argument, a
        configuration file that cannot be run.
    """
    args = flags.FlagValues()
    flags.DEFINE_bool("json", False, "print one JSON object last", flag_values=args)
    flags.DEFINE_bool("debug", False, "show tracebacks of errors", flag_values=args)
    flags.DEFINE_bool("help", False, "show this help", flag_values=args)
    if define is not None:
        define(args)
    rest = list(argv)
    if config:
        rest = _define_config(args, argv)
    try:
        stray = args(["ftjax", *rest])[1:]
    except flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname, args) from error
    except flags.Error as error:
        raise _bad_value(str(error), args) from error
    if args.help:
        print(_usage(help_text, args, config=config))
        return None
    if stray:
        near = difflib.get_close_matches(stray[0], list(args), 1)
        raise UserError(
            "an argument that is no flag",
            where="command line",
            expected="--flag=value",
            got=stray[0],
            fix=f"did you mean --{near[0]}?" if near else "quote values with spaces",
        )
    return args


def define_format(args: Args, name: str, allowed: list[str], what: str) -> None:
    """The flags that say how weights are quantized; `name` is that of the format."""
    text = flags.DEFINE_string
    flags.DEFINE_enum(name, None, allowed, what, flag_values=args)
    flags.DEFINE_integer("group", -1, "numbers a scale; 0: a channel", flag_values=args)
    flags.DEFINE_enum(
        "scheme",
        "symmetric",
        ["symmetric", "affine"],
        "of int8 and int4: without or with a zero point",
        flag_values=args,
    )
    flags.DEFINE_bool("double_quant", False, "quantize the scales", flag_values=args)
    text("targets", "all-linear", "which projections: regexes", flag_values=args)
    text("pattern", "", "regex=format,... before --format", flag_values=args)


def define_source(args: Args) -> None:
    """The flags that say which model: `--model` or `--workdir`, and `--adapter`."""
    text = flags.DEFINE_string
    text("model", "", "a checkpoint folder, a Hub name, or 'base'", flag_values=args)
    text("workdir", "", "the folder of a run", flag_values=args)
    text("adapter", "", "folders of PEFT adapters to put on it", flag_values=args)
    text("adapter_weights", "", "of their sum; empty: 1 each", flag_values=args)
    flags.DEFINE_integer(
        "adapter_rank",
        0,
        "brings their sum back to this rank; 0: it stays exact",
        lower_bound=0,
        flag_values=args,
    )
    flags.DEFINE_enum(
        "weights",
        "auto",
        ["auto", "best", "last"],
        "of a run: its best checkpoint, its last, or (auto) the best that was kept",
        flag_values=args,
    )


def load_config(path: str) -> Any:
    """Runs `get_config` of a file named as `FILE.py` or `FILE.py:ARGS`.

    Raises:
      UserError: no such file, a syntax error, no `get_config`, or it raised; with
        file:line.
    """
    name, colon, argument = path.partition(":")
    file = Path(name)
    if not file.is_file():
        near = [str(p) for p in sorted(file.parent.glob("*.py")) if p.stem[0] != "_"]
        close = difflib.get_close_matches(str(file), near, 1)
        raise UserError(
            "there is no such configuration file",
            where="--config",
            expected="a Python file with get_config()",
            got=name or "(empty)",
            fix=f"did you mean {close[0]}?" if close else None,
        )
    with _errors_at_their_line(file):
        module = _run_module(file)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(
            "the configuration file has no get_config()",
            where=str(file),
            fix="define get_config(), which returns an ml_collections.ConfigDict",
        )
    with _errors_at_their_line(file):
        made = module.get_config(argument) if colon else module.get_config()
    from ml_collections import ConfigDict

    if not isinstance(made, ConfigDict):
        raise UserError(
            "get_config() did not return a configuration",
            where=str(file),
            expected="an ml_collections.ConfigDict",
            got=type(made).__name__,
        )
    return made.lock()


def _run_module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError("not a Python file", where=str(file), expected="FILE.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _errors_at_their_line(file: Path) -> Iterator[None]:
    """What a configuration raises is the user's to mend: shown with file:line."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(
            f"syntax error in the configuration: {error.msg}",
            where=f"{error.filename}:{error.lineno}",
            got=(error.text or "").strip() or None,
        ) from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if Path(f.filename).resolve() == file.resolve()]
        at = f"{file}:{own[-1].lineno}" if own else str(file)
        raise UserError(
            f"the configuration raised {type(error).__name__}: {error}",
            where=at,
            got=own[-1].line if own else None,
        ) from error


def _define_config(args: Args, argv: list[str]) -> list[str]:
    """Defines `config` and its keys; returns the arguments without `--config`."""
    from ml_collections import config_flags

    path, rest = _take_config(argv)
    if path is None:
        used = next((a for a in rest if a.startswith(("--config.", "-config."))), None)
        if used:
            raise UserError(
                "a configuration key without a configuration",
                where=used,
                fix="name the file too: --config=configs/sft.py",
            )
        flags.DEFINE_string("config", None, "the file", flag_values=args)
        return rest
    made = load_config(path)
    keys = dict(leaves(made))
    for argument in rest:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if match and match[1] not in keys:
            raise _unknown_key(match[1], keys, made)
    config_flags.DEFINE_config_dict(
        "config", made, flag_values=args, sys_argv=["ftjax", *rest]
    )
    return rest


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    path, rest, i = None, [], 0
    while i < len(argv):
        flag, equals, value = argv[i].partition("=")
        i += 1
        if flag not in ("--config", "-config"):
            rest.append(argv[i - 1])
            continue
        if not equals:
            if i == len(argv):
                raise UserError("--config names no file", where="command line")
            value, i = argv[i], i + 1
        if path is not None:
            raise UserError(
                "--config is given twice", where="command line", got=f"{path}, {value}"
            )
        path = value
    return path, rest


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every value of a `ConfigDict`."""
    from ml_collections import ConfigDict

    for key in config:
        kind = config.get_type(key)
        if issubclass(kind, ConfigDict):
            yield from leaves(config[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", kind


def _meant(name: str, keys: Iterable[str]) -> list[str]:
    """The keys that are called so elsewhere, or are so called without their section."""
    there = NAMES[name].key if name in NAMES else name
    return [key for key in keys if there in (key, key.rpartition(".")[2])]


def _did_you_mean(name: str, near: Sequence[str]) -> str:
    """A question, and how the thing that is called `name` elsewhere differs."""
    differs = NAMES[name].differs if name in NAMES else ""
    return f"did you mean {' or '.join(near)}?" + (f" ({differs})" if differs else "")


def _unknown_key(key: str, keys: dict[str, Any], config: Any) -> UserError:
    section, _, name = key.rpartition(".")
    near = _meant(name, [*keys, *FLAGS]) or difflib.get_close_matches(key, keys, 3, 0.6)
    siblings = [k for k in keys if k.rpartition(".")[0] == section]
    siblings += (
        []
        if section
        else sorted({f"{k.partition('.')[0]}.*" for k in keys if "." in k})
    )
    got, fix = None, _did_you_mean(name, near[:3]) if near else None
    if siblings == [f"{section}.name"]:
        # A section of nothing but its kind: the key is of another kind.
        kind = config[section].name
        got = f"{section}.name={kind!r}, which has no `{name}`"
        fix = (
            f"leave it out, or choose another {section}: --config=FILE.py:{section}=..."
        )
    return UserError(
        "there is no such configuration key",
        where=f"--config.{key}",
        expected="one of " + ", ".join(siblings) if siblings else None,
        got=got,
        fix=fix,
    )


def _unknown_flag(name: str, args: Args) -> UserError:
    known = [flag for flag in args if not flag.startswith("config.")]
    made = args["config"].default if "config" in args else None
    keys = [key for key, _ in leaves(made)] if made is not None else []
    meant = _meant(name, [*keys, *(f"--{flag}" for flag in known)])
    if meant:
        named = [k if k.startswith("--") else f"--config.{k}" for k in meant]
        return UserError(
            f"there is no flag --{name}",
            where="command line",
            expected="a flag of the command, or a key of its configuration",
            fix=_did_you_mean(name, named),
        )
    near = difflib.get_close_matches(name, known, 2, 0.5)
    return UserError(
        f"there is no flag --{name}",
        where="command line",
        expected="one of " + ", ".join(f"--{flag}" for flag in sorted(known)),
        fix="did you mean " + " or ".join(f"--{n}" for n in near) + "?"
        if near
        else "see --help",
    )


def _bad_value(message: str, args: Args) -> UserError:
    match = _ILLEGAL.fullmatch(message)
    if not match:
        return UserError(message, where="command line", expected="--flag=value")
    name, value, reason = match.groups()
    flag = args[name]
    kinds = {"integer": "int", "double": "float", "boolean": "bool"}
    kind = flag.flag_type().replace("config_literal", "a literal")
    for long, short in kinds.items():
        kind = kind.replace(long, short)
    return UserError(
        "a value of the wrong kind",
        where=f"--{name}",
        expected=kind,
        got=f"{value!r} ({reason.strip().strip('()')})",
        fix=f"such as --{name}={flag.default}" if flag.default is not None else None,
    )


def _usage(text: str, args: Args, *, config: bool) -> str:
    lines = [text.strip(), "", "flags:"]
    if config:
        lines.append("  --config=FILE.py[:ARGS]  the configuration")
        lines.append("  --config.KEY=VALUE       one of its values")
    for name in sorted(args):
        flag = args[name]
        if name.startswith("config"):
            continue
        unsaid = flag.default is None or flag.default is False or flag.default == ""
        default = "" if unsaid else f" [{flag.default}]"
        lines.append(f"  --{name}: {flag.help}{default}")
    return "\n".join(lines)


def _help_text(main: Main) -> str:
    module = sys.modules.get(main.__module__)
    return (module.__doc__ if module else None) or main.__doc__ or ""


@contextlib.contextmanager
def _stdout_to_stderr(active: bool) -> Iterator[None]:
    with contextlib.redirect_stdout(sys.stderr) if active else contextlib.nullcontext():
        yield
