"""What is between the projections of a Mamba-2 layer, in one call, against its steps in float64.

The steps: torch's convolution and norm, and the recurrence token by token, of each document by itself.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import stock
from model.test_native import ROUNDING, close, documents_of, with_gradients
from model.test_packed import numbers, slow_recurrence
from nestling.arch.submodel import Submodel
from nestling.model.cache import Cache
from nestling.model.native import library
from nestling.model.native.sequence import between, sequence, suits
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard, masked
from nestling.train.chunked import predicted

if library.library() is None:
    pytest.skip("no C++ compiler here", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned")
FLOOR, EPS = 0.3, 1e-3


def values_of(
    batch: int, length: int, groups: int, heads: int, channels: int, state: int, taps: int, seed: int
) -> list[Tensor]:
    """What was projected, taps and bias of the convolution, dt_bias, A, D and the norm's weight, float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inner, pair = groups * heads * channels, 2 * groups * state
    projected = random(batch, length, 2 * inner + pair + groups * heads)
    projected[..., -groups * heads :] *= 8  # dt at its floor, and where softplus is the identity
    return [
        projected,
        random(taps, inner + pair) / taps,
        random(inner + pair),
        random(groups, heads),
        -random(groups, heads).exp(),
        random(groups, heads),
        random(groups, heads * channels),
    ]


def narrowed(values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    projected, *vectors = values
    return [projected.to(dtype), *(vector.to(library.summed_in(dtype)) for vector in vectors)]


def slowly(
    cut: list[int], projected: Tensor, taps: Tensor, bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, norm: Tensor
) -> Tensor:
    (groups, heads), taps_count, channels = A.shape, len(taps), taps.shape[1]
    found = []
    for document in projected.split(cut, 1):
        z, xBC, dt = document.split([norm.numel(), channels, A.numel()], -1)
        seen = F.pad(xBC.mT, (taps_count - 1, 0))
        xBC = F.silu(F.conv1d(seen, taps.mT[:, None], bias, groups=channels)).mT
        x, B, C = xBC.tensor_split([norm.numel(), (norm.numel() + channels) // 2], -1)
        dt = F.softplus(dt.unflatten(-1, (groups, heads)) + dt_bias).clamp(min=FLOOR)
        B, C = (t.unflatten(-1, (groups, -1)) for t in (B, C))
        S = x.new_zeros(len(x), groups, heads, norm.shape[1] // heads, B.shape[-1])
        y, _ = slow_recurrence(x.unflatten(-1, (groups, heads, -1)), dt, A, B, C, D, S)
        gated = y.flatten(3) * F.silu(z.unflatten(-1, (groups, -1)))
        found.append((F.rms_norm(gated, gated.shape[-1:], eps=EPS) * norm).flatten(2))
    return torch.cat(found, 1)


@settings(max_examples=60)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 150, 2, 5, 37, 20))),
    taps=st.integers(2, 4),
    cuts=st.lists(st.integers(0, 150), max_size=4),
    dtype=st.sampled_from(list(ROUNDING)),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_one_call_is_all_its_steps(
    sizes: tuple[int, ...], taps: int, cuts: list[int], dtype: torch.dtype, threads: int, seed: int
) -> None:
    *sizes, state = sizes
    values = values_of(*sizes, state=state + 8, taps=taps, seed=seed)
    cut = documents_of(sizes[1], cuts)
    documents = numbers(cut).expand(sizes[0], -1) if len(cut) > 1 else None
    narrow = narrowed(values, dtype)
    expected = with_gradients([narrow[0].double(), *values[1:]], lambda *given: [slowly(cut, *given)])
    torch.set_num_threads(threads)
    try:
        found = with_gradients(narrow, lambda *given: [between(*given, documents, FLOOR, EPS)])
        with torch.no_grad():
            close([between(*narrow, documents, FLOOR, EPS)], expected[:1], dtype)
    finally:
        torch.set_num_threads(1)
    close(found, expected, dtype)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_any_number_of_threads_makes_the_same_bits_of_what_is_not_a_sum(threads: None) -> None:
    values = values_of(2, 300, 2, 4, 32, 32, 4, seed=0)
    found = with_gradients(values, lambda *given: [between(*given, None, FLOOR, EPS)])[:2]
    torch.set_num_threads(1)
    expected = with_gradients(values, lambda *given: [between(*given, None, FLOOR, EPS)])[:2]
    assert torch.equal(found[0], expected[0])
    close(found, expected, torch.float64)


@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])])
def test_it_is_as_declared(documents: Tensor | None) -> None:
    given = [value.requires_grad_() for value in values_of(2, 5, 2, 3, 4, 4, 4, seed=0)]
    torch.library.opcheck(sequence, (*given, documents, FLOOR, EPS))


def test_what_it_keeps_has_no_gradient_and_can_be_used_twice() -> None:
    values = [value.requires_grad_() for value in values_of(1, 5, 1, 2, 4, 8, 4, seed=0)]
    kept = sequence(*values, None, FLOOR, EPS)
    assert not any(t.requires_grad for t in kept[1:])
    first = torch.autograd.grad(kept[0].sum(), values, retain_graph=True)
    again = torch.autograd.grad(kept[0].sum(), values)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def ran(model: NemotronH, *given: Any, **more: Any) -> set[str]:
    with Operations() as operations:
        model(stock.tokens(16, 1), *given, **more)
    return {name.removeprefix("nestling::") for name in operations.names if name.startswith("nestling::")}


def test_models_take_it_where_nothing_is_between_its_steps() -> None:
    model = stock.randomize(NemotronH(stock.TINY), 0)
    small = Submodel(mamba_num_heads=2)
    assert "native_sequence" in ran(model)
    assert "native_sequence" in ran(model, hard(stock.TINY, small))
    assert "native_sequence" in ran(model, documents_BL=torch.zeros(1, stock.tokens(16, 1).shape[1]).long())
    with torch.autocast("cpu", torch.bfloat16):
        assert {"native_sequence", "native_attention"} <= ran(model)
    assert {"native_sequence", "native_attention"} <= ran(copy.deepcopy(model).bfloat16())
    apart = {"conv", "native_scan"}
    assert apart <= ran(model, masked(stock.TINY, small))
    assert apart <= ran(model, watch=lambda *shown: None)
    assert apart <= ran(model, attention_mask_BS=torch.ones_like(stock.tokens(16, 1)))
    assert apart <= ran(model, cache=Cache())


@pytest.mark.parametrize("documents", [False, True])
def test_learning_under_autocast_is_as_near_to_float64_as_without_kernels(
    documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = stock.randomize(NemotronH(stock.TINY), 0), stock.tokens(16, 2, 90)
    numbers_ = (torch.arange(90) // 37).expand(2, -1) if documents else None

    def slopes(model: NemotronH) -> list[Tensor]:
        hidden = model.hidden(ids, documents_BL=numbers_)
        loss = predicted(hidden.flatten(0, 1), model.head_weight(), ids.flatten())
        return list(torch.autograd.grad(loss, list(model.parameters())))

    exact, narrow = slopes(copy.deepcopy(model).double()), []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(library, "library", lambda: None)
        with torch.autocast("cpu", torch.bfloat16):
            narrow.append(slopes(model))
    for true, with_kernels, without in zip(exact, *narrow, strict=True):
        assert with_kernels.dtype == without.dtype == torch.float32
        assert (with_kernels - true).norm() <= 1.5 * (without - true).norm() + 0.02 * true.norm()
        assert (with_kernels - true).norm() <= 0.1 * true.norm()


def test_it_suits_what_fills_a_vector() -> None:
    projected, taps, _, _, _, _, norm = values_of(1, 5, 1, 2, 4, 8, 4, seed=0)
    assert suits(projected, taps, norm)
    assert not suits(projected.float(), taps, norm)
    assert not suits(projected.bfloat16(), taps, norm)
    assert suits(projected.bfloat16(), taps.float(), norm.float())
    assert not suits(projected.bfloat16(), taps.float(), norm)
    assert not suits(projected.half(), taps.float(), norm.float())
    assert not suits(projected, taps[:1], norm)
    assert not suits(projected, taps[:, 1:], norm)


def test_a_kernel_gets_no_mixture_of_types() -> None:
    model, ids, cache = stock.randomize(NemotronH(stock.TINY), 0), stock.tokens(16, 1, 90), Cache()
    expected = copy.deepcopy(model).double()(ids).logits
    with torch.no_grad():
        model(ids[:, :5], cache=cache)
        for layer in cache.layers.values():
            layer.update({name: layer[name].double() for name in {"key", "value"} & layer.keys()})
        found = model.double()(ids[:, 5:], cache=cache).logits
        torch.testing.assert_close(found, expected[:, 5:], rtol=1e-4, atol=1e-5)
        model.float().get_submodule("layers.0.mixer").A_log.data = torch.zeros(4, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="Double"):
            model(ids)


def test_an_empty_batch_is_an_empty_answer() -> None:
    values = [value.requires_grad_() for value in values_of(0, 5, 1, 2, 4, 8, 4, seed=0)]
    y = between(*values, None, FLOOR, EPS)
    assert y.shape == (0, 5, 8)
    assert not any(slope.any() for slope in torch.autograd.grad(y.sum(), values))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_dt_is_torchs_softplus_to_the_last_digits(dtype: torch.dtype, rounding: float) -> None:
    special = torch.tensor([-1e30, -float("inf"), 0.0, 20.0, 20.0001, 1e30, float("inf"), float("nan")])
    raw = torch.cat([torch.linspace(-70, 70, 991, dtype=torch.float64), special.double()]).to(dtype)
    projected, *rest = (value.to(dtype) for value in values_of(1, len(raw), 1, 1, 4, 8, 4, seed=0))
    projected[0, :, -1], rest[2] = raw, torch.zeros(1, 1, dtype=dtype)
    dt = sequence(projected, *rest, None, 0.0, EPS)[2].flatten()
    torch.testing.assert_close(dt, F.softplus(raw), rtol=rounding, atol=1e-30, equal_nan=True)


@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 150, 2, 5, 37, 20))),
    taps=st.integers(2, 4),
    cuts=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 99),
)
def test_what_is_carried_goes_on_where_it_ended(
    sizes: tuple[int, ...], taps: int, cuts: list[int], dtype: torch.dtype, seed: int
) -> None:
    *sizes, state = sizes
    values = values_of(*sizes, state=state + 8, taps=taps, seed=seed)
    projected, *rest = narrowed(values, dtype)
    expected = slowly([sizes[1]], projected.double(), *values[1:])
    batch, length, groups, heads, channels = sizes
    window = rest[0].new_zeros(batch, taps + 1, rest[0].shape[1])[:, 1:-1]  # a part of something longer
    kept = rest[0].new_zeros(batch, groups, heads, channels, state + 8)
    with torch.no_grad():
        parts = projected.split(documents_of(length, [*cuts, 1]), 1)
        found = torch.cat([between(part, *rest, None, FLOOR, EPS, (window, kept)) for part in parts], 1)
    close([found], [expected], dtype)
    if dtype == torch.bfloat16:  # nothing in between was rounded
        assert (found - expected).norm() <= 2**-8 * expected.norm()
    before = groups * heads * channels
    inputs = F.pad(projected[..., before : before + rest[0].shape[1]], (0, 0, taps - 1, 0))[:, 1 - taps :]
    assert torch.equal(window, inputs.to(window.dtype))
