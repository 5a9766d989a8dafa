"""The chunked scan against the recurrence itself, one token after the other, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nestling.model.scan import Decay, pieces
from nestling.model.ssd import causal_conv, ssd, ssd_step

pytestmark = pytest.mark.usefixtures("each_path")


def inputs(length: int, seed: int = 0, batch: int = 2, g: int = 2, h: int = 3, p: int = 2, n: int = 3) -> list[Tensor]:
    """x, dt, A, B, C, D and an initial state, float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        random(batch, length, g, h, p),
        random(batch, length, g, h).exp() * 0.5,
        -random(g, h).exp(),
        random(batch, length, g, n),
        random(batch, length, g, n),
        random(g, h),
        random(batch, g, h, p, n),
    ]


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """S = exp(dt A) S + dt x ⊗ B, y = S C + D x, for every batch row, head and token by itself."""
    y, S = torch.zeros_like(x), S.clone()
    batch, length, groups, heads, _ = x.shape
    for b, g, h in ((b, g, h) for b in range(batch) for g in range(groups) for h in range(heads)):
        for t in range(length):
            S[b, g, h] = torch.exp(dt[b, t, g, h] * A[g, h]) * S[b, g, h]
            S[b, g, h] += dt[b, t, g, h] * torch.outer(x[b, t, g, h], B[b, t, g])
            y[b, t, g, h] = S[b, g, h] @ C[b, t, g] + D[g, h] * x[b, t, g, h]
    return y, S


def same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-11, atol=1e-11)


@given(length=st.integers(1, 11), chunk=st.integers(1, 13), seed=st.integers(0, 99), continued=st.booleans())
def test_the_scan_is_the_recurrence(length: int, chunk: int, seed: int, continued: bool) -> None:
    *given, state = inputs(length, seed)
    start = state if continued else None
    same(ssd(*given, start, chunk=chunk), recurrence(*given, state if continued else torch.zeros_like(state)))


@pytest.mark.parametrize(("length", "chunk"), [(1, 1), (1, 64), (7, 3), (9, 3), (4, 5), (130, 64)])
@pytest.mark.parametrize("continued", [False, True])
def test_lengths_that_matter(length: int, chunk: int, continued: bool) -> None:
    *given, state = inputs(length, batch=1, g=1, h=2)
    start = state if continued else None
    same(ssd(*given, start, chunk=chunk), recurrence(*given, state if continued else torch.zeros_like(state)))


def test_one_token_at_a_time_is_the_recurrence() -> None:
    *given, state = inputs(1)
    x, dt, A, B, C, D = given
    y, after = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state.clone())
    same((y[:, None], after), recurrence(*given, state))


def test_a_scan_in_two_pieces_is_the_scan() -> None:
    x, dt, A, B, C, D, state = inputs(11)
    whole = ssd(x, dt, A, B, C, D, state, chunk=4)
    first, between = ssd(x[:, :5], dt[:, :5], A, B[:, :5], C[:, :5], D, state, chunk=4)
    second, last = ssd(x[:, 5:], dt[:, 5:], A, B[:, 5:], C[:, 5:], D, between, chunk=4)
    same((torch.cat([first, second], 1), last), whole)


def test_strong_decay_neither_overflows_nor_leaks() -> None:
    x, dt, A, B, C, D, state = inputs(12)
    given = x, dt * 100, A * 100, B, C, D
    y, last = ssd(*given, state, chunk=6)
    same((y, last), recurrence(*given, state))
    assert y.isfinite().all()


@pytest.mark.parametrize("length", [1, 3, 5])
@pytest.mark.parametrize("continued", [False, True])
def test_gradients(length: int, continued: bool) -> None:
    given = inputs(length, batch=1, g=2, h=1, p=2, n=2)
    if not continued:
        given.pop()
    torch.autograd.gradcheck(lambda *values: ssd(*values, chunk=2), [value.requires_grad_() for value in given])


def test_gradients_in_float32_survive_a_large_direct_term() -> None:
    x, dt, A, B, C, D, state = inputs(70, n=8)
    exact = [x, dt, A, B / 100, C / 100, D, state]
    single = [value.float() for value in exact]
    found, expected = (
        torch.autograd.grad(ssd(*values, chunk=16)[0].square().sum(), values)
        for values in ([value.requires_grad_() for value in given] for given in (single, exact))
    )
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


def test_a_decay_is_as_fast_where_nothing_is_left() -> None:
    """exp of less than -87 is a hundred times slower on a CPU; no decay asks for it."""
    x, dt, A, *_ = inputs(12)
    (piece,) = pieces(x, 12)
    decay = Decay.of(piece, dt * 100, A * 100, None)
    for left in (decay.within_CBghTS, decay.from_start_CBgTh, decay.to_end_CBgTh):
        assert not ((left > 0) & (left < 1e-27)).any()
    assert (decay.from_start_CBgTh < 1e-25).any()  # it would have been, here
    assert not decay.within_CBghTS.triu(1).any()


def test_strong_decay_has_finite_gradients() -> None:
    x, dt, A, B, C, D, state = (value.requires_grad_() for value in inputs(12))
    y, last = ssd(x, dt * 100, A * 100, B, C, D, state, chunk=6)
    (y.sum() + last.sum()).backward()
    assert all(value.grad.isfinite().all() for value in (x, dt, A, B, C, D, state))


@given(length=st.integers(1, 9), width=st.integers(1, 5), bias=st.booleans(), seed=st.integers(0, 99))
def test_the_convolution_is_torchs(length: int, width: int, bias: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(2, length, 3, generator=generator), torch.randn(3, 1, width, generator=generator)
    b, window = torch.randn(3, generator=generator), torch.randn(2, width - 1, 3, generator=generator)
    y, after = causal_conv(x, weight[:, 0].mT, b if bias else None, window)
    seen = torch.cat([window, x], 1)
    summed = torch.nn.functional.conv1d(seen.transpose(1, 2), weight, b if bias else None, groups=3).transpose(1, 2)
    torch.testing.assert_close(y, torch.nn.functional.silu(summed), rtol=1e-5, atol=1e-6)
    assert torch.equal(after, seen[:, seen.shape[1] - (width - 1) :])
