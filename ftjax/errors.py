"""What a user sees when something is wrong: one screen, one exit code.

A `UserError` says what is wrong, where, what was expected against what was found, and
what to do. `run_entry` turns it into that screen; anything else is a bug and keeps its
traceback.
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

EXIT_OK = 0
EXIT_USER = 2
EXIT_DIVERGED = 3
EXIT_RESOURCES = 4
EXIT_BUSY = 5
EXIT_BUG = 70
EXIT_STOPPED = 75

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SPACE_TEXTS = ("No space left", "Disk quota exceeded", "File too large")


class UserError(Exception):
    """A mistake that the user can mend.

    Args:
      what: the fault in one sentence.
      where: file:line, row, config key or tensor name.
      expected: what would have been right.
      got: what was found.
      fix: what to do now.
      code: the exit code of the process.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | os.PathLike[str] | None = None,
        expected: str | None = None,
        got: str | None = None,
        fix: str | None = None,
        code: int = EXIT_USER,
    ):
        super().__init__(what)
        self.what, self.where, self.code = what, where, code
        self.expected, self.got, self.fix = expected, got, fix

    def screen(self) -> str:
        """The message as it is printed, one labelled line per part."""
        parts = [
            ("where", self.where),
            ("expected", self.expected),
            ("got", self.got),
            ("to do", self.fix),
        ]
        lines = [f"error: {self.what}"]
        for label, text in parts:
            if text is not None:
                body = str(text).replace("\n", "\n" + " " * 12)
                lines.append(f"  {label + ':':<9} {body}")
        return "\n".join(lines)


def require_regular(path: Path) -> None:
    """Refuses what is there and is no file: a pipe would be waited for without end.

    A folder is left to whoever opens it: the messages for those say more.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(
            "this is not a regular file",
            where=path,
            got="a pipe, a socket or a device",
            fix="write its contents to a file first",
        )


class Stopped(Exception):
    """The run was asked to stop, has saved, and can be resumed (exit code 75)."""


def run_entry(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs `main(argv)` and returns the exit code; prints errors as one screen.

    `--debug` anywhere in `argv` prints the traceback of a user error too. Where the
    command names a `--workdir` that exists, the full traceback is left in its
    `error.txt`.
    """
    try:
        main(argv)
    except UserError as error:
        _leave_trace(argv)
        if "--debug" in argv:
            traceback.print_exc()
        print(error.screen(), file=sys.stderr)
        return error.code
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit:
        raise
    except BaseException as error:
        _leave_trace(argv)
        told = _in_the_input(error)
        if told is not None:
            print(told.screen(), file=sys.stderr)
            return told.code
        traceback.print_exc()
        print("error: this is a bug in ftjax, not in your input", file=sys.stderr)
        return EXIT_BUG
    return EXIT_OK


def disk_full(
    error: BaseException, path: str | os.PathLike[str] | None
) -> UserError | None:
    """What to tell the user of a write that found no space; None: it is not that.

    Libraries wrap the operating system's errors; then their text has to do.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number not in _NO_SPACE and not any(t in str(error) for t in _NO_SPACE_TEXTS):
        return None
    return UserError(
        "the disk is full",
        where=path,
        got=os.strerror(number or errno.ENOSPC),
        fix="free some space and start the same command again: it continues "
        "from the last saved step",
        code=EXIT_RESOURCES,
    )


def _in_the_input(error: BaseException) -> UserError | None:
    """What other libraries raise for input that is wrong, whoever reads it."""
    if type(error).__name__ == "PanicException":
        return UserError(
            "the tokenizer cannot be used: its own library gives up on it",
            got=str(error)[:300],
            fix="use the tokenizer files that were published with the model",
        )
    if isinstance(error, OSError) and (full := disk_full(error, error.filename)):
        return full
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UserError("a path is too long", got=str(error.filename)[:200])
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return UserError("a path begins with ~ and a user who is not known here")
    return None


def _leave_trace(argv: list[str]) -> None:
    for i, arg in enumerate(argv):
        flag, _, value = arg.lstrip("-").partition("=")
        if flag == "workdir":
            folder = Path(value or (argv[i + 1] if i + 1 < len(argv) else ""))
            if value or i + 1 < len(argv):
                try:
                    if folder.is_dir():
                        trace = traceback.format_exc()
                        (folder / "error.txt").write_text(
                            trace, "utf-8", "backslashreplace"
                        )
                except OSError as error:
                    print(f"could not write error.txt: {error}", file=sys.stderr)
