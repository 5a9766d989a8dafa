"""Correct first: nothing is timed before its results agree with a reference in float64."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nestling.errors import NestlingError

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float64: 1e-10}


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not filled is NaN: what an operation leaves out is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def error(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest difference, as a share of the largest value of its tensor. NaN stays NaN."""
    pairs = (
        (a.detach().to("cpu", torch.float64), b.to("cpu", torch.float64)) for a, b in zip(found, reference, strict=True)
    )
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def agree(
    what: str, runs: Mapping[str, Callable[[], Sequence[Tensor]]], reference: Sequence[Tensor], tolerance: float
) -> float:
    """Every run's results are the reference's; returns the error of the first, ours."""
    errors = {}
    for name, run in runs.items():
        with poisoned():
            errors[name] = error(run(), reference)
        if not errors[name] <= tolerance:
            raise NestlingError(
                f"bench {what}: {name} differs from the reference by {errors[name]:.1e} of the largest value, allowed "
                f"is {tolerance:.0e}; nothing of it was timed. Please report this"
            )
    return next(iter(errors.values()))
