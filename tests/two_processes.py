"""Commands of ours in two processes that meet over gloo, told of one another as torchrun tells its own."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

CODE = """
import contextlib, io, json, os, sys
from nestling import cli, console
for port, command in json.loads(sys.argv.pop()):
    os.environ["MASTER_PORT"], said = str(port), [io.StringIO(), io.StringIO()]
    sys.argv = [part.replace("{rank}", os.environ["RANK"]) for part in command]
    with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]):
        console.console.file, code = said[1], 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, *(each.getvalue() for each in said)]))
"""


@dataclass(frozen=True)
class Said:
    """How a command ended in one process."""

    code: int
    out: str
    err: str


def run(*commands: list[str], count: int = 2) -> list[list[Said]]:
    """What every process said of each command, [rank][command]; all are started once, and meet once per command.

    {rank} in a command stands for the rank.
    """
    work = json.dumps([*zip(_ports(len(commands)), commands, strict=True)])
    told = start(["-c", CODE, work], count)
    return [[Said(*json.loads(line)) for line in out.splitlines()] for out in told]


def start(arguments: list[str], count: int = 2) -> list[str]:
    """What Python with these arguments prints in every process, once all have ended well."""
    shared = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_ports(1)[0])}
    running = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=shared | {"RANK": str(rank)},
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    told = [process.communicate(timeout=300) for process in running]
    assert all(process.returncode == 0 for process in running), [err for _, err in told]
    return [out for out, _ in told]


def _ports(count: int) -> list[int]:
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
