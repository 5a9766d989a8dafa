"""Sums over calibration batches that survive being stopped.

Every sum is kept apart for even and for odd batches: the two halves say how stable a ranking is. Sums are float64, are
saved whole, and are added in the order of the batches, after a resume and whichever of several processes measured one:
the result is that of one uninterrupted process, bit for bit.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nestling import ranks
from nestling.console import console
from nestling.progress import Progress
from nestling.weights.files import write_file_atomically

Sums = dict[str, Tensor]
Tick = Callable[[int], None]
"""Told of each layer that was computed."""


class Batches(Protocol):
    """Calibration data: (ids [B, L], real [B, L]) batches, right-padded; real is 1 where a token is not padding.

    Every pass over it must give the same batches; nothing keeps them.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Placed:
    """Batches on a device."""

    batches: Batches
    device: torch.device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((ids_BL.to(self.device), real_BL.to(self.device)) for ids_BL, real_BL in self.batches)


@dataclass
class Partial:
    """The sums so far of every pass, in memory and (with a file) on disk; `fingerprint` says what they are sums of."""

    file: Path | None = None
    fingerprint: str = ""
    every: int = 8  # batches between saves
    done: dict[str, int] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)

    @staticmethod
    def resume(file: Path, fingerprint: str, every: int = 8) -> "Partial":
        """What the same command left when it was stopped; nothing if there is no such file or it is of other inputs."""
        fresh = Partial(file, fingerprint, every)
        if not file.exists():
            return fresh
        try:
            note, sums = _read(file)
            before, done = note["fingerprint"], dict(note["done"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            console.print(f"{file} is damaged ({error}); starting again", soft_wrap=True)
            return fresh
        if before != fingerprint:
            console.print("rank: model, data or options have changed since it was stopped; starting again")
            return fresh
        console.print(f"rank: going on where it was stopped ({sum(done.values())} batches are saved)")
        return Partial(file, fingerprint, every, done, sums)

    def save(self) -> None:
        if self.file is None or not ranks.first():
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        flat = {f"{title}/{name}": value for title, sums in self.sums.items() for name, value in sums.items()}
        note = json.dumps({"fingerprint": self.fingerprint, "done": self.done})
        write_file_atomically(self.file, save(flat, metadata={"nestling": note}))

    def discard(self) -> None:
        """Forget the file: the ranking is written."""
        if self.file is not None and ranks.first():
            self.file.unlink(missing_ok=True)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Sums]]:
    sums: dict[str, Sums] = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dict
            title, _, own = name.partition("/")
            sums.setdefault(title, {})[own] = opened.get_tensor(name).clone()
        return json.loads(opened.metadata()["nestling"]), sums


def accumulate(
    title: str, batches: Batches, measure: Callable[[Tensor, Tensor], Sums], partial: Partial
) -> dict[str, Tensor]:
    """Σ over batches of every tensor that `measure(ids, real)` names, [2, ...]: over the even ones and the odd ones.

    Several processes measure a batch each at a time, and all of them have the sums.
    """
    sums, done = partial.sums.setdefault(title, {}), partial.done.get(title, 0)
    own = ranks.mine(islice(batches, done, None))
    for start in range(done, len(batches), ranks.size()):
        batch = next(own, None)
        for index, found in enumerate(ranks.gathered(_here(measure(*batch)) if batch else {}), start):
            for name, value in found.items():
                if name not in sums:
                    sums[name] = torch.zeros(2, *value.shape, dtype=torch.float64)
                sums[name][index % 2] += value
        partial.done[title] = end = min(start + ranks.size(), len(batches))
        if end // partial.every > start // partial.every or end == len(batches):
            partial.save()
    return sums


def _here(found: Sums) -> Sums:
    return {name: value.cpu() for name, value in found.items()}


def counter(show: Progress, start: int, note: Callable[[int], str]) -> Tick:
    """Moves a progress bar on by one layer at each call, and by those that other processes computed meanwhile."""
    done = start

    def tick(layer: int) -> None:
        nonlocal done
        done += ranks.size()
        show(done, note(layer))

    return tick
