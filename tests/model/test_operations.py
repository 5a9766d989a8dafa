"""The two operations that torch.compile does not look into do what they declare to it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.test_ssd import inputs
from nestling.model.conv import conv
from nestling.model.native import library, mamba
from nestling.model.scan import scan

kernels = pytest.mark.skipif(library.library() is None, reason="no C++ compiler here")


def turned(t: Tensor) -> Tensor:
    """The same values in another order in memory."""
    return t.detach().mT.contiguous().mT.requires_grad_()


@pytest.mark.parametrize("scan", [scan, pytest.param(mamba.scan, marks=kernels)])
@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])])
def test_the_scan_is_as_declared(scan: Any, documents: Tensor | None) -> None:
    given = [value.requires_grad_() for value in inputs(5)]
    given[3] = turned(given[3])
    torch.library.opcheck(scan, (*given, documents, 2))


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])])
def test_the_convolution_is_as_declared(documents: Tensor | None) -> None:
    shapes = (2, 5, 19), (4, 19), (19,), (2, 3, 19)
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    given[1] = turned(given[1])
    torch.library.opcheck(conv, (*given, documents))
