"""Few tokens times a weight, on the paths that only a CPU takes, against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F

from nestling.model import width
from nestling.model.width import FEW, LEAST, product


@pytest.mark.parametrize("count", [1, LEAST - 1, LEAST, 30, FEW, FEW + 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kept", [(20, 12), (13, 7)])  # whole, and a strided prefix
def test_a_product_of_few_tokens_is_torchs(count: int, bias: bool, kept: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(count)
    weight = torch.randn(20, 12, generator=generator)[: kept[0], : kept[1]]
    x, b = torch.randn(count, 1, 12, generator=generator)[..., : kept[1]], torch.randn(kept[0], generator=generator)
    found = product(x, weight, b if bias else None)
    assert found.is_contiguous()
    expected = F.linear(x.double(), weight.double(), b.double() if bias else None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("count", "columns"), [(LEAST - 1, False), (LEAST, True), (FEW, True), (FEW + 1, False)])
def test_few_tokens_are_columns(count: int, columns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[torch.Tensor] = []
    monkeypatch.setattr(width.F, "linear", lambda x, weight, bias: rows.append(x))
    product(torch.zeros(count, 3), torch.zeros(2, 3))
    assert (not rows) == columns


def test_gradients_of_a_product_of_few_tokens() -> None:
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 9, 5), (3, 5), (3,)))
    exact = [value.detach().double().requires_grad_() for value in (x, weight, bias)]
    found = torch.autograd.grad(product(x, weight, bias).square().sum(), (x, weight, bias))
    expected = torch.autograd.grad(F.linear(*exact).square().sum(), exact)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kept", [(20, 48), (13, 40), (13, 9)])  # whole, read as stored, and too few columns for it
def test_one_row_in_bfloat16(bias: bool, kept: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(kept))
    stored = torch.randn(7 + 20 * 48, generator=generator).bfloat16()[7:].view(20, 48)  # begins anywhere
    x, b = (torch.randn(count, generator=generator).bfloat16() for count in (kept[1], kept[0]))
    found = product(x[None, None], stored[: kept[0], : kept[1]], b if bias else None)
    assert found.shape == (1, 1, kept[0])
    expected = F.linear(x.double(), stored[: kept[0], : kept[1]].double(), b.double() if bias else None)
    torch.testing.assert_close(found[0, 0].double(), expected, rtol=2e-2, atol=5e-2)
