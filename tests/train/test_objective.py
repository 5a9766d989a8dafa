"""Losses against the plain formulas, in float64, values and gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.train.objective import cross_entropy, distillation, resource


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()


COUNTED = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 1], [1, 1, 0, 0, 0]]).bool()
STUDENT, TEACHER, TARGETS = random(3, 5, 7), random(3, 5, 7, seed=1), torch.arange(15).view(3, 5) % 7


def with_gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def plain_kl(student: Tensor) -> Tensor:
    """Σ p (log p - log q) at every counted position, one after the other."""
    places, total = COUNTED.nonzero().tolist(), torch.zeros((), dtype=torch.float64)
    for row, column in places:
        p = TEACHER[row, column].detach().exp() / TEACHER[row, column].detach().exp().sum()
        q = student[row, column].exp() / student[row, column].exp().sum()
        total = total + (p * (p.log() - q.log())).sum()
    return total / len(places)


def test_distillation_is_the_mean_kl_of_the_counted_positions() -> None:
    ours = with_gradient(lambda x: distillation(x, TEACHER.detach(), COUNTED), STUDENT)
    torch.testing.assert_close(ours, with_gradient(plain_kl, STUDENT), rtol=1e-12, atol=1e-14)
    student = STUDENT[COUNTED].detach().log_softmax(-1)
    pytorch = F.kl_div(student, TEACHER[COUNTED].detach().softmax(-1), reduction="batchmean")
    torch.testing.assert_close(ours[0], pytorch, rtol=1e-12, atol=0)
    assert not ours[1][~COUNTED].any()
    assert ours[1][COUNTED].abs().min() > 0


def test_distillation_points_from_the_teacher_to_the_student() -> None:
    peaked, flat = torch.tensor([[[9.0, 0, 0]]]), torch.zeros(1, 1, 3)
    here = torch.ones(1, 1, dtype=torch.bool)
    assert distillation(flat, peaked, here) < distillation(peaked, flat, here)  # KL(teacher ‖ student), not the reverse
    assert distillation(peaked, peaked, here).abs() < 1e-7


def test_distillation_does_not_see_a_shift_or_uncounted_positions() -> None:
    shifted = STUDENT + torch.where(COUNTED, 5.0, torch.nan)[..., None]
    torch.testing.assert_close(
        distillation(shifted, TEACHER, COUNTED), distillation(STUDENT, TEACHER, COUNTED), rtol=1e-12, atol=0
    )


def test_cross_entropy_is_the_mean_over_the_counted_positions() -> None:
    def plain(logits: Tensor) -> Tensor:
        chosen = [-logits[r, c].log_softmax(-1)[TARGETS[r, c]] for r, c in COUNTED.nonzero().tolist()]
        return torch.stack(chosen).mean()

    ours = with_gradient(lambda x: cross_entropy(x, TARGETS, COUNTED), STUDENT)
    torch.testing.assert_close(ours, with_gradient(plain, STUDENT), rtol=1e-12, atol=1e-14)
    assert not ours[1][~COUNTED].any()
    wild = torch.where(COUNTED[..., None], STUDENT.detach(), torch.nan)
    assert cross_entropy(wild, TARGETS.masked_fill(~COUNTED, -7), COUNTED) == ours[0]


@pytest.mark.parametrize(
    ("expected", "loss", "slope"),
    [(1000, 0, 0), (1019, 0, 0), (981, 0, 0), (1021, 0.021, 1e-3), (979, 0.021, -1e-3), (2000, 1, 1e-3), (0, 1, -1e-3)],
)
def test_the_resource_loss_is_a_relative_gap_outside_its_dead_zone(expected: float, loss: float, slope: float) -> None:
    value, gradient = with_gradient(lambda x: resource(x, 1000, 0.02), torch.tensor(expected, dtype=torch.double))
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert gradient.item() == pytest.approx(slope, abs=1e-12)
