"""The command line. Verbs read a directory or a recipe and write a directory; bad input is one line and exit 2."""

import errno
import io
import sys
from typing import Any

import typer

from nestling.cli import checkpoints, recipes, sizes  # noqa: F401 - their verbs
from nestling.cli.app import app
from nestling.errors import NestlingError
from nestling.stopping import stoppable


def main() -> None:
    """Run the command line: exit 0, or 2 with one line about bad input, or 130 when stopped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character gets another
            stream.reconfigure(errors="replace")
    with stoppable():
        sys.exit(_run())


def _run() -> int:
    try:
        code = app(standalone_mode=False) or 0
    except typer.Abort:
        code = 130
    except Exception as error:
        print(_line(error), file=sys.stderr)
        code = 2
    try:
        print(end="", flush=True)
    except BrokenPipeError:  # nobody reads on
        sys.stdout = None
    except OSError as error:  # at the end Python would only say that it ignored it
        if code == 0:
            print(_line(error), file=sys.stderr)
        sys.stdout, code = None, 2
    if code == 130:  # typer's way to hand on that it was stopped
        raise KeyboardInterrupt
    return code


def _line(error: Any) -> str:
    """What to say about bad input; anything else is a defect of ours, and raised on."""
    if isinstance(error, NestlingError):
        return f"nestling: {error}"
    if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EIO):
        return f"nestling: what is printed cannot be written: {error.strerror}"
    if not hasattr(error, "format_message"):  # click's errors, whose module is typer's own affair
        raise error
    message = error.format_message()
    return message if "\n" in message else f"nestling: {message}"
