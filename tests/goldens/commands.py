"""The command line of the scripts that are run by hand: a command, then folders."""

import sys
from collections.abc import Callable
from pathlib import Path


def run(*commands: Callable[..., None]) -> None:
    """Calls the command that is named like the first argument, with the others."""
    name, *folders = sys.argv[1:]
    {command.__name__: command for command in commands}[name](*map(Path, folders))
