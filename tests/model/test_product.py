"""A weight times any number of tokens, with kernels and without, against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F

from nestling.model.native.product import FLOAT
from nestling.model.width import product

pytestmark = pytest.mark.usefixtures("each_path")


@pytest.mark.parametrize("count", [1, 2, FLOAT[0], 9, 30, FLOAT[-1], FLOAT[-1] + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kept", [(640, 420), (611, 401)])  # whole, and a strided prefix
@torch.no_grad()
def test_a_product_is_torchs(count: int, dtype: torch.dtype, bias: bool, kept: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(count)
    weight = torch.randn(641, 421, generator=generator).to(dtype)[1 : 1 + kept[0], 1 : 1 + kept[1]]  # begins anywhere
    x = torch.randn(count, 1, 420, generator=generator).to(dtype)[..., : kept[1]]
    b = torch.randn(kept[0], generator=generator).to(dtype)
    found = product(x, weight, b if bias else None)
    assert found.dtype == dtype
    assert found.is_contiguous()
    expected = F.linear(x.double(), weight.double(), b.double() if bias else None)
    assert (found - expected).norm() <= (5e-3 if dtype == torch.bfloat16 else 1e-6) * expected.norm()


def test_gradients_of_a_product_of_few_tokens() -> None:
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 9, 520), (530, 520), (530,)))
    exact = [value.detach().double().requires_grad_() for value in (x, weight, bias)]
    found = torch.autograd.grad(product(x, weight, bias).square().sum(), (x, weight, bias))
    expected = torch.autograd.grad(F.linear(*exact).square().sum(), exact)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
