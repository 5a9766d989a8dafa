"""Losses against the plain formulas, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.train.objective import Objective, graded, resource


def random(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER, TARGETS = random(9, 7), random(9, 7, seed=1), torch.arange(9) % 7


def loss(student: Tensor, teacher: Tensor | None = TEACHER, **objective: Any) -> float:
    taught = None if teacher is None else teacher.clone()
    return graded(Objective(**objective), student.clone(), taught, TARGETS[: len(student)])[0].item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("cross_entropy", [0.0, 0.7])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_loss_and_a_share_of_its_gradient(temperature: float, cross_entropy: float, share: float) -> None:
    student = STUDENT.clone().requires_grad_()
    q, p = (student / temperature).log_softmax(-1), (TEACHER / temperature).softmax(-1)
    wanted = temperature**2 * F.kl_div(q, p, reduction="sum")
    wanted = wanted + cross_entropy * F.cross_entropy(student, TARGETS, reduction="sum")
    found = graded(
        Objective(temperature, cross_entropy=cross_entropy), STUDENT.clone(), TEACHER.clone(), TARGETS, share
    )
    by_student = share * torch.autograd.grad(wanted, student)[0]
    torch.testing.assert_close(found, (wanted.detach(), by_student), rtol=1e-12, atol=1e-14)


def test_without_a_teacher_only_targets_are_learnt() -> None:
    wanted = F.cross_entropy(STUDENT, TARGETS, reduction="sum").item()
    assert loss(STUDENT, None, cross_entropy=1, temperature=3.0, top_k=2) == pytest.approx(wanted, rel=1e-12)


def test_the_divergence_points_from_the_teacher_to_the_student() -> None:
    peaked, flat = torch.tensor([[9.0, 0, 0]]), torch.zeros(1, 3)
    assert loss(flat, peaked) < loss(peaked, flat)  # KL(teacher ‖ student), not the reverse
    assert abs(loss(peaked, peaked)) < 1e-7


def test_the_divergence_does_not_see_a_shift() -> None:
    assert loss(STUDENT + 5, TEACHER - 3) == pytest.approx(loss(STUDENT), rel=1e-12)


@pytest.mark.parametrize(
    ("expected", "loss", "slope"),
    [(1000, 0, 0), (1019, 0, 0), (981, 0, 0), (1021, 0.021, 1e-3), (979, 0.021, -1e-3), (2000, 1, 1e-3), (0, 1, -1e-3)],
)
def test_the_resource_loss_is_a_relative_gap_outside_its_dead_zone(expected: float, loss: float, slope: float) -> None:
    cost = torch.tensor(expected, dtype=torch.double, requires_grad=True)
    value = resource(cost, 1000, 0.02)
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert torch.autograd.grad(value, cost)[0].item() == pytest.approx(slope, abs=1e-12)
