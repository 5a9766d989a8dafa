"""Ctrl-C and the request to end, from the first moment on: one line and exit code 130, never a traceback."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[None]:
    """Say so and exit with 130 when what is done inside is stopped."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        try:
            yield
        finally:  # a signal that is under way is heard here, and none after it
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except KeyboardInterrupt:
        print("nestling: stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
