"""Runs a program that nobody has read: another process, an empty directory, no environment, limits on what it may use.

It keeps honest programs from doing harm by mistake. It is no wall against one that means to: the files and the network
of this user stay within its reach, so run it where that does not matter, such as in a container.
"""

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

KEPT = 1 << 20
"""Bytes of output that are looked at."""
_BOOT = """
import os, resource, sys
for what, most in (
    (resource.RLIMIT_CPU, {seconds}),
    (resource.RLIMIT_AS, {memory}),
    (resource.RLIMIT_FSIZE, {file}),
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_NOFILE, 64),
):
    resource.setrlimit(what, (most, most))
os.execve(sys.executable, [sys.executable, "-I", "-S", "-B", sys.argv[1]], {{}})
"""
"""Sets limits that the program cannot raise again, and becomes the program: the standard library alone."""


@dataclass(frozen=True)
class Limits:
    """Seconds of time, and bytes of memory and of each file written, output included."""

    seconds: int = 10
    memory: int = 1 << 30
    file: int = 1 << 24


@dataclass(frozen=True)
class Done:
    """What a program printed, and what went wrong: None if it ended well."""

    output: str
    fault: str | None


def run_python(code: str, given: str, limits: Limits) -> Done:
    """Run a program with this standard input; nothing it wrote is left, and nothing it started goes on."""
    with tempfile.TemporaryDirectory(prefix="nestling-program-") as home:
        program, out = Path(home, "program.py"), Path(home, "out")
        program.write_text(code, "utf-8", errors="replace")
        with open(out, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOT.format(**asdict(limits)), str(program)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.DEVNULL,
                cwd=home,
                env={},
                start_new_session=True,
            )
            fault = _wait(process, given, limits.seconds)
        with open(out, "rb") as printed:
            text = printed.read(KEPT).decode("utf-8", errors="replace")
    return Done(text, fault)


def _wait(process: "subprocess.Popen[bytes]", given: str, seconds: int) -> str | None:
    try:
        process.communicate(given.encode("utf-8", errors="replace"), timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"ran longer than {seconds} s"
    finally:
        _end(process)
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}"
    return f"exit code {process.returncode}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End it with all that it started in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
