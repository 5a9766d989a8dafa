"""How much memory a training needs, and how much there is: asked before anything is started."""

from collections.abc import Mapping
from pathlib import Path

from nestling.arch.architecture import Architecture
from nestling.arch.cost import BF16, FP32
from nestling.arch.submodel import tensors
from nestling.errors import NestlingError
from nestling.sections import Optimization as Section
from nestling.sections import TrainSection
from nestling.units import decimal

OPTIMIZER_TENSORS = {"muon": 1, "adamw": 2}  # float32 tensors per parameter


def memory(architecture: Architecture, how: TrainSection) -> dict[str, int]:
    """Bytes that the worst moment of a step needs on one process, by what they are for.

    "step" is what exists besides weights, gradients and optimizer: activations, what the teacher said, the logits of a
    chunk (train/footprint.py). It is left out where the length of a sequence is not known.
    """
    stored = [tensor for tensor in tensors(architecture) if not tensor.buffer]
    total = sum(tensor.numel for tensor in stored)
    inside = sum(tensor.numel for tensor in stored if tensor.layer is not None and len(tensor.shape) == 2)
    optimizer = OPTIMIZER_TENSORS[how.optimizer] * inside + OPTIMIZER_TENSORS["adamw"] * (total - inside)
    found = {
        "master weights": FP32 * total,
        "gradients": FP32 * total,
        "optimizer": FP32 * optimizer,
        "teacher": (BF16 if how.precision == "bf16" else FP32) * total,
    }
    rows = ((min(how.micro_batch or stage.batch, stage.batch), stage.length) for stage in how.stages)
    positions = [count * length for count, length in rows if length is not None]
    if positions:
        found["step"] = _step(architecture, how, max(positions))
    return found | {"total": sum(found.values())}


def _step(architecture: Architecture, how: TrainSection, positions: int) -> int:
    from nestling.train.footprint import footprint
    from nestling.train.objective import Objective
    from nestling.train.optimize import Optimization

    settings = Optimization(**how.model_dump(include=set(Section.model_fields)))
    return footprint(architecture, settings, Objective(**how.objective.model_dump()), positions)


def check_memory(needed: Mapping[str, int], what: str) -> None:
    """Refuse a training that will not fit. Nothing is said where the system does not tell what is free."""
    free = available()
    if free is None or needed["total"] <= free:
        return
    parts = ", ".join(f"{name} {decimal(size)}" for name, size in needed.items() if size and name != "total")
    raise NestlingError(
        f"{what} needs about {decimal(needed['total'])} of memory ({parts}), and {decimal(free)} are free. "
        "A smaller micro_batch, activation_checkpointing = true, objective.chunk, or optimizer = 'muon' need less; "
        "nothing was started"
    )


def available() -> int | None:
    """Bytes that this process may still take, by the system's own word: of the machine, and of its control group."""
    lines = _lines(Path("/proc/meminfo"))
    machine = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    limit, used, parts = (_lines(Path("/sys/fs/cgroup") / f"memory.{name}") for name in ("max", "current", "stat"))
    cached = sum(int(line.split()[1]) for line in parts if line.startswith("file "))  # given back when it is needed
    group = [int(limit[0]) - int(used[0]) + cached] if limit and used and limit[0].isdigit() else []
    return min(machine + group, default=None)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
