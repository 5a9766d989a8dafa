"""Nestling: train once, get every size. Elastic checkpoints of hybrid Mamba-2 / attention / MLP language models."""

import importlib
from typing import Any

from nestling.arch.submodel import Architecture, Submodel
from nestling.errors import NestlingError

__version__ = "0.1.0"
__all__ = ["Architecture", "NestlingError", "Submodel", "load", "slice"]

_LAZY = {"load": "nestling.infer.family", "slice": "nestling.weights.transform"}


def __getattr__(name: str) -> Any:
    """Import what needs numpy or torch only when it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'nestling' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
