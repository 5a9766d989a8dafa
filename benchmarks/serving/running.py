"""A server of a family in a process of its own, for the scripts beside this file."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from nestling.tasks import Task, distinct, problems

TASK = "chain_sum:min_terms=2,max_terms=3,max_digits=2"


@dataclass(frozen=True)
class Server:
    url: str
    pid: int
    sizes: tuple[str, ...]  # ids of models that name a size

    def metric(self, name: str) -> float:
        found = re.search(rf"^nestling_{name} (\S+)", httpx.get(f"{self.url}/metrics").text, re.M)
        assert found is not None, name
        return float(found[1])

    def resident(self) -> int:
        """Bytes of the server in memory, the mapped weights included."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


@contextmanager
def serving(directory: Path, *options: str) -> Iterator[Server]:
    """`nestling serve` on a free port of the loopback, ended by SIGTERM; it must then leave without an error."""
    command = [sys.executable, "-m", "nestling", "serve", str(directory), "--port", "0", "--name", "family", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split("/v1 ")[0]
            models = httpx.get(f"{url}/v1/models").json()["data"]
            yield Server(url, process.pid, tuple(model["id"] for model in models if "@" in model["id"]))
        finally:
            process.terminate()
    assert process.returncode == 0, process.returncode


def questions(count: int) -> list[str]:
    """Held-out prompts of the demo's task."""
    return [problem.prompt for problem in distinct(problems(Task.parse(TASK), 0, held_out=True), count)]
