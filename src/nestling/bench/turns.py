"""Where everything is timed: several things in turns, so that whatever else the machine does hits them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nestling.bench.machine import Limits, finish

if TYPE_CHECKING:
    import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """How the table is measured."""

    device: str = "cpu"
    rounds: int = 5
    quick: bool = False  # tiny work, one round: does it run and agree?
    limits: Limits = field(default_factory=Limits)
    vllm: Path | None = None  # the Python of an environment that has vLLM

    @property
    def dtype(self) -> "torch.dtype":
        """In what models are run where nothing else is said: float32, on a GPU bfloat16."""
        import torch

        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def in_turn(self, runs: Mapping[str, Run], rounds: int | None = None) -> "Times":
        """Run everything once untimed, then each once a round, the other way round every second time."""
        for run in runs.values():
            run()
        times = []
        with _uninterrupted():
            for number in range(rounds or self.rounds):
                order = list(runs) if number % 2 == 0 else list(runs)[::-1]
                times.append({name: self._seconds(runs[name]) for name in order})
        return Times(tuple(times))

    def _seconds(self, run: Run) -> float:
        finish(self.device)
        began = time.perf_counter()
        run()
        finish(self.device)
        return time.perf_counter() - began


@dataclass(frozen=True)
class Times:
    """Seconds per round of several things that were run in turn."""

    rounds: tuple[Mapping[str, float], ...]

    def ratio(self, top: str, bottom: str) -> tuple[float, ...]:
        """How many times as long `top` takes, in each round."""
        return tuple(row[top] / row[bottom] for row in self.rounds)

    def median(self, name: str) -> float:
        return statistics.median(row[name] for row in self.rounds)

    def quickest(self, *names: str) -> str:
        return min(names, key=self.median)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Without the garbage collector, whose pauses hit whoever is running."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
