"""The steps between the products against torch's own, and their gradients against finite differences."""

import pytest
import torch

from nestling.model.pointwise import normalized, squared_relu

pytestmark = pytest.mark.usefixtures("each_path")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 4, 5), (1, 1, 1, 1)])
def test_a_norm_over_its_whole_width_is_torchs(shape: tuple[int, ...]) -> None:
    x, weight = random(*shape), random(*shape[1:], seed=1)
    expected = torch.nn.functional.rms_norm(x, shape[-1:], eps=1e-5) * weight
    torch.testing.assert_close(normalized(x, weight, shape[-1], 1e-5), expected)
    with torch.no_grad():
        torch.testing.assert_close(normalized(x, weight, shape[-1], 1e-5), expected)


@pytest.mark.parametrize(("shape", "groups"), [((3, 5, 2, 7), 2), ((1, 40, 3, 40), 3), ((2, 3, 1, 16), 1)])
def test_a_gated_norm_is_that_of_what_went_through_the_gate(shape: tuple[int, ...], groups: int) -> None:
    x, weight = random(*shape), random(groups, shape[-1], seed=1)
    wider = random(*shape[:2], groups * shape[-1] + 9, seed=2)
    gate = wider[..., 4:-5].unflatten(-1, (groups, -1))  # a part of something wider, as it comes
    given, through = (x, gate, weight), x * torch.nn.functional.silu(gate)
    expected = torch.nn.functional.rms_norm(through, shape[-1:], eps=1e-5) * weight
    found = normalized(x, weight, shape[-1], 1e-5, gate)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(normalized(x, weight, shape[-1], 1e-5, gate), expected)
    dy = random(*shape, seed=3).detach()
    for one, other in zip(torch.autograd.grad(found, given, dy), torch.autograd.grad(expected, given, dy), strict=True):
        torch.testing.assert_close(one, other)
    single = normalized(x.float(), weight.float(), shape[-1], 1e-5, gate.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


def test_zeros_are_left_out_of_a_norm_by_its_width() -> None:
    x, weight = random(2, 6), random(6, seed=1)
    cut = torch.nn.functional.pad(x[:, :4], (0, 2))
    expected = torch.nn.functional.rms_norm(x[:, :4], (4,), eps=1e-2) * weight[:4]
    torch.testing.assert_close(normalized(cut, weight, 4, 1e-2)[:, :4], expected)


def test_a_norm_of_zeros_is_zero_and_its_gradient_is_finite() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y = normalized(x, torch.ones(4), 4, 1e-5)
    y.sum().backward()
    assert not y.any()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((2, 4), 1e-5**-0.5))


@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 2, 3)])
def test_gradients_of_a_norm_of_a_fixed_width(shape: tuple[int, ...]) -> None:
    given = random(*shape), random(*shape[2:] or shape[1:], seed=1), random(*shape, seed=2)
    torch.autograd.gradcheck(lambda x, weight, gate: normalized(x, weight, 3, 1e-2, gate), given)
    torch.autograd.gradcheck(lambda x, weight: normalized(x, weight, 3, 1e-2), given[:2])


@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 2, 3)])
def test_gradients_of_a_norm(shape: tuple[int, ...]) -> None:
    active = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    given = random(*shape), random(*shape[2:] or shape[1:], seed=1), active
    torch.autograd.gradcheck(lambda *values: normalized(*values, 1e-2), given)


def test_gradients_of_the_squared_relu() -> None:
    x = random(4, 5)
    with torch.no_grad():
        torch.testing.assert_close(squared_relu(x), x.clamp(min=0) ** 2)
    torch.testing.assert_close(squared_relu(x), x.clamp(min=0) ** 2)
    torch.autograd.gradcheck(squared_relu, x)
