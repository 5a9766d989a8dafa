"""The one error type users see: what was given, what is allowed, what to do. The command line prints it and exits 2."""

import difflib
from collections.abc import Iterable


class NestlingError(ValueError):
    """Bad input: a path, a file, a size or a key that cannot be used. The message is one clear line for the user."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`'a', 'b' or 'c'` with the closest match first asked for, to end an error message with."""
    names = [str(name) for name in allowed]
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    listed = ", ".join(names)
    return f"did you mean {close[0]!r}? (allowed: {listed})" if close else f"allowed: {listed}"
