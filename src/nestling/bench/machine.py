"""The machine: what it is, and the most it does, measured in the same run."""

import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from nestling.errors import NestlingError, nearest

GIB = 2**30
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Limits:
    """What a large product, a large read and a large copy reach."""

    flops: Mapping[str, float] = field(default_factory=dict)  # per second, by dtype
    read: float | None = None  # bytes per second
    copy: float | None = None  # bytes read and written per second

    def of_flops(self, done: float, seconds: float, dtype: str) -> float | None:
        """The share of the limit that `done` operations in so many seconds are."""
        return done / seconds / self.flops[dtype] if dtype in self.flops else None

    def of_read(self, nbytes: float, seconds: float) -> float | None:
        return None if self.read is None else nbytes / seconds / self.read


def check_device(device: str) -> None:
    """Refuse a device that is not here, before anything is measured."""
    if device not in DEVICES:
        raise NestlingError(f"bench --device {device!r}: {nearest(device, DEVICES)}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise NestlingError(
                f"bench --device cuda: torch {torch.__version__} finds no GPU here; leave --device out to measure the "
                "CPU, or install a build of torch for CUDA on a machine that has one"
            )


def finish(device: str) -> None:
    """Wait until the device has done all that it was given; a CPU always has."""
    if device != "cpu":
        import torch

        torch.get_device_module(device).synchronize()


def measure(device: str, quick: bool) -> Limits:
    """The limits of this machine. A GPU's products of float32 are as exact as torch makes them by default, no TF32."""
    import torch

    size, count = (256, 2**20) if quick else (3072 if device == "cpu" else 8192, 2**26)
    dtypes = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if has_bf16(device) else {})
    flops = {}
    for name, dtype in dtypes.items():
        a = torch.randn(size, size, device=device).to(dtype)
        flops[name] = 2 * size**3 / _best(lambda a=a: a @ a, device)  # type: ignore[misc]
    source, target = torch.ones(count, device=device), torch.zeros(count, device=device)
    rows = source.view(-1, 4096)
    reads = (source.sum, lambda: torch.mv(rows, rows[0]))  # whichever is faster
    read = source.nbytes / min(_best(run, device) for run in reads)
    return Limits(flops, read, 2 * source.nbytes / _best(lambda: target.copy_(source), device))


def _best(run: Callable[[], object], device: str, times: int = 5) -> float:
    """Seconds of the fastest of a few: a limit is what the machine can do."""
    best = float("inf")
    for _ in range(times):
        finish(device)
        began = time.perf_counter()
        run()
        finish(device)
        best = min(best, time.perf_counter() - began)
    return best


def has_bf16(device: str) -> bool:
    """Whether products of bfloat16 are done by the hardware."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    supported = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(ask is not None and ask() for ask in supported)


def circumstances(device: str) -> dict[str, Any]:
    import torch

    from nestling.evaluate.machine import machine, versions

    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": torch.cuda.get_device_name() if device == "cuda" else machine(),
        "threads": torch.get_num_threads(),
        **{name: version for name, version in versions().items() if name in ("python", "torch", "transformers")},
    }


def commit() -> str:
    """Of the checkout that runs, with `-dirty` where files differ from it; else the version."""
    import nestling

    asked = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"version {nestling.__version__}"
    return found.stdout.strip()
