"""What the benchmarks of the model share: timing in turn, the machine, tables."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds per round of several things that were run in turn."""

    rounds: tuple[Mapping[str, float], ...]

    def ratio(self, rival: str, ours: str) -> tuple[float, float, float]:
        """How many times as long the rival takes: min, median, max over the rounds."""
        ratios = [row[rival] / row[ours] for row in self.rounds]
        return min(ratios), statistics.median(ratios), max(ratios)

    def median(self, name: str) -> float:
        return statistics.median(row[name] for row in self.rounds)


def in_turn(runs: Mapping[str, Run], rounds: int, device: str) -> Times:
    """Run everything once untimed, then every round each once."""
    for run in runs.values():
        run()
    return Times(tuple({name: _seconds(run, device) for name, run in runs.items()} for _ in range(rounds)))


def _seconds(run: Run, device: str) -> float:
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def circumstances(device: str) -> dict[str, object]:
    import transformers

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    where = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "date": date.today().isoformat(),
        "commit": commit,
        "machine": where,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report(rows: list[dict[str, object]], about: Mapping[str, object], as_json: bool) -> None:
    """One table, a row per case; ratios are min, median, max."""
    if as_json:
        print(json.dumps({**about, "rows": rows}, indent=1))
        return
    print(" · ".join(f"{key} {value}" for key, value in about.items()), "\n")
    print("|" + "|".join(f" {name} " for name in rows[0]) + "|")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("|" + "|".join(f" {_cell(value)} " for value in row.values()) + "|")


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return " / ".join(f"{number:.2f}" for number in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
