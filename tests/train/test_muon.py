"""Our Muon is torch's, without its bfloat16."""

import pytest
import torch
from torch import nn

from nestling.train import muon
from nestling.train.muon import Muon, orthogonalize

SHAPES = [(16, 16), (24, 8), (8, 24), (1, 6), (40, 3)]


def matrices(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [0.95, 0.6])
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.bfloat16, 1e-5), (torch.float32, 0.05)])
def test_several_steps_are_torchs(
    monkeypatch: pytest.MonkeyPatch, weight_decay: float, momentum: float, precision: torch.dtype, tolerance: float
) -> None:
    """Equal when ours multiplies in bfloat16 too, and else up to what bfloat16 loses."""
    monkeypatch.setattr(muon, "orthogonalize", lambda matrix: orthogonalize(matrix.to(precision)))
    ours, theirs, start = matrices(0), matrices(0), matrices(0)
    mine = Muon(ours, lr=0.02, weight_decay=weight_decay, momentum=momentum)
    stock = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=weight_decay, momentum=momentum, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(6):
        for our, their, gradient in zip(ours, theirs, matrices(step + 1), strict=True):
            our.grad, their.grad = gradient.detach().clone(), gradient.detach().clone()
        mine.step()
        stock.step()
        for our, their, before in zip(ours, theirs, start, strict=True):
            moved = (their - before).norm()
            assert (our - their).norm() < tolerance * moved, f"{tuple(our.shape)} at step {step}"


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64), (1, 9), (9, 1)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_directions(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    well_conditioned = torch.linalg.svdvals(matrix) > 0.05 * torch.linalg.svdvals(matrix).max()
    assert orthogonalize(matrix).shape == shape
    assert ((values[well_conditioned] - 1).abs() < 0.4).all(), values
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.T @ orthogonalize(matrix) @ right.T  # diagonal: the singular vectors are the matrix's own
    torch.testing.assert_close(core, core.diagonal().diag(), rtol=0, atol=1e-4)


def test_orthogonalize_does_not_see_scale_and_survives_zero() -> None:
    matrix = torch.randn(6, 10, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(orthogonalize(1e3 * matrix), orthogonalize(matrix), rtol=1e-4, atol=1e-5)
    assert torch.equal(orthogonalize(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_a_parameter_without_a_gradient_stays_as_it_is() -> None:
    (matrix, other, *_), before = matrices(0), matrices(0)
    optimizer = Muon([matrix, other], lr=0.1, weight_decay=0.5)
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    assert not torch.equal(matrix, before[0])
    assert torch.equal(other, before[1])
    assert other not in optimizer.state
