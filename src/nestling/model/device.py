"""The device that a process computes on."""

import os

import torch

from nestling import ranks
from nestling.errors import NestlingError, nearest


def find_device(asked: str, option: str = "layout.device = ") -> torch.device:
    """cpu, cuda, or auto, which is a GPU where there is one: of the processes of a machine each has its own."""
    if asked not in (allowed := ("auto", "cpu", "cuda")):
        raise NestlingError(f"{option}{asked!r} is unknown; {nearest(asked, allowed)}")
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise NestlingError(f"{option}{asked!r}: torch {torch.__version__} finds no GPU here; 'cpu' is allowed")
    count, own = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if own >= count:
        raise NestlingError(
            f"this machine has {count} GPUs, and torchrun started {ranks.size_here()} processes on it; start as many "
            f"as there are GPUs, or say {option}'cpu'"
        )
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def prefers_gpu(asked: str) -> bool:
    """Whether a process that is asked for a device would compute on a GPU, also one that is not here."""
    return asked == "cuda" or (asked == "auto" and torch.cuda.is_available())


def free(device: torch.device) -> int | None:
    """Bytes that may still be taken on a GPU; None of a CPU, whose memory the system knows (memory.py)."""
    return None if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
