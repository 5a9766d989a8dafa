"""What makes a short command start sooner."""

import gc
import os

_THREADS = "OPENBLAS_NUM_THREADS"


def start_sooner() -> None:
    """Import numpy without the threads of its BLAS, which spin for 0.1 s as they start: where nothing is multiplied.

    The variable that says so is gone again before torch or another process could heed it. A user's own stays. What
    imports make stays too, and is not looked through again and again (25 ms); trainings leave more behind.
    """
    gc.set_threshold(10_000, 20, 20)
    ours = _THREADS not in os.environ
    if ours:
        os.environ[_THREADS] = "1"
    try:
        import numpy  # noqa: F401
    finally:
        if ours:
            del os.environ[_THREADS]
