"""Nestling: train once, get every size. Elastic checkpoints of hybrid Mamba-2 / attention / MLP language models."""

import importlib
from typing import TYPE_CHECKING, Any

from nestling.errors import NestlingError

if TYPE_CHECKING:
    from nestling.arch.architecture import Architecture
    from nestling.arch.submodel import Submodel
    from nestling.infer.family import Family, load
    from nestling.weights.slicing import slice

__version__ = "0.1.0"
__all__ = ["Architecture", "Family", "NestlingError", "Submodel", "load", "slice"]

_HOMES = {
    "Architecture": "nestling.arch.architecture",
    "Submodel": "nestling.arch.submodel",
    "Family": "nestling.infer.family",
    "load": "nestling.infer.family",
    "slice": "nestling.weights.slicing",
}


def __getattr__(name: str) -> Any:
    """Import numpy or torch only for what needs them, when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nestling' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
