"""Start-up of the command line, whole processes, and that neither torch nor transformers is imported."""

import subprocess
import sys
import time
from collections.abc import Iterator

from nestling.bench.figure import Figure
from nestling.bench.turns import Bench
from nestling.errors import NestlingError

COMMANDS = {"--help": ["--help"], "plan": ["plan", "nemotron-nano-12b-v2"], "slice --help": ["slice", "--help"]}
ASKED = (
    "import sys; from nestling.__main__ import main\n"
    "try: main()\n"
    "except SystemExit: pass\n"
    "print('heavy:', *({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
)


def figures(bench: Bench) -> Iterator[Figure]:
    for name, arguments in COMMANDS.items():
        command = [sys.executable, "-c", ASKED, *arguments]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr.strip().splitlines()[-1]
        if said != "heavy:":
            raise NestlingError(f"bench startup: nestling {name} imports {said.removeprefix('heavy: ')}")
        rounds = tuple(_seconds(command) for _ in range(1 if bench.quick else bench.rounds))
        yield Figure("startup", name, "none", "s", rounds, None if bench.quick else 0.3)


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - began
