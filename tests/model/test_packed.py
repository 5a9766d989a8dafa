"""Several documents in one row are computed as if each were alone: packed = unpacked, in float64.

The oracles: the recurrence one token after the other, torch's own convolution, and stock transformers, each run on one
document at a time.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nestling
import stock
from model.test_ssd import inputs, recurrence
from nestling.arch.architecture import Architecture
from nestling.errors import NestlingError
from nestling.model import conv, mamba2
from nestling.model.cache import Cache
from nestling.model.nemotron_h import NemotronH
from nestling.model.ssd import causal_conv, ssd
from nestling.model.width import Width, Widths, hard
from strategies import architectures, submodels

Fresh = Callable[[], Path]

pytestmark = pytest.mark.usefixtures("each_path")

EDGES = [[4, 4, 4], [1] * 7, [13], [3, 1, 9], [1, 12], [12, 1], [5, 3, 4]]
"""Cuts around chunks of 4: a boundary at every edge, documents of one token, one over several chunks."""
cuts = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def numbers(cut: list[int], reused: bool = False) -> Tensor:
    """The document of every position [L]; `reused`: the same two numbers again and again."""
    return torch.cat([torch.full((size,), number % 2 if reused else 7 - number) for number, size in enumerate(cut)])


def random(like: Tensor, seed: int = 5) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def same(found: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=lambda text: f"{what}: {text}")


# ---- the scan and the convolution


def check_scan(cut: list[int], chunk: int, seed: int, continued: bool) -> None:
    """Outputs, last state and gradients of a packed scan against the recurrence, document by document."""
    given = [value.requires_grad_() for value in inputs(sum(cut), seed)]
    x, dt, A, B, C, D, state = given
    alone, last = [], state if continued else torch.zeros_like(state)
    pieces = zip(*(value.split(cut, 1) for value in (x, dt, B, C)), strict=True)
    for index, (x_, dt_, B_, C_) in enumerate(pieces):
        y, last = slow_recurrence(x_, dt_, A, B_, C_, D, last if index == 0 else torch.zeros_like(state))
        alone.append(y)
    found = ssd(x, dt, A, B, C, D, state if continued else None, chunk, numbers(cut).expand(x.shape[0], -1))
    expected = torch.cat(alone, 1), last
    for one, other in zip(found, expected, strict=True):
        same(one, other, "result")
    wanted = given if continued else given[:-1]
    ours, theirs = (
        torch.autograd.grad(sum((y * random(y)).sum() for y in result), wanted) for result in (found, expected)
    )
    for name, one, other in zip(["x", "dt", "A", "B", "C", "D", "state"], ours, theirs, strict=False):
        same(one, other, f"gradient of {name}")


def slow_recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token, for all heads at once, so that it can be differentiated."""
    outputs = []
    for t in range(x.shape[1]):
        S = S * torch.exp(dt[:, t] * A)[..., None, None]
        S = S + torch.einsum("bgh,bghp,bgn->bghpn", dt[:, t], x[:, t], B[:, t])
        outputs.append(torch.einsum("bghpn,bgn->bghp", S, C[:, t]) + D[..., None] * x[:, t])
    return torch.stack(outputs, 1), S


def test_the_differentiable_recurrence_is_the_naive_one() -> None:
    given = inputs(6)
    for one, other in zip(slow_recurrence(*given), recurrence(*given), strict=True):
        same(one, other)


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("cut", EDGES)
def test_packed_scans_that_matter(cut: list[int], continued: bool) -> None:
    check_scan(cut, 4, 0, continued)


@given(cut=cuts, chunk=st.integers(1, 12), seed=st.integers(0, 99), continued=st.booleans())
def test_a_packed_scan_is_the_recurrence_of_each_document(
    cut: list[int], chunk: int, seed: int, continued: bool
) -> None:
    check_scan(cut, chunk, seed, continued)


def test_a_boundary_stops_what_hardly_decays() -> None:
    x, dt, A, B, C, D, state = inputs(9)
    slow = A * 1e-9
    y, _ = ssd(x, dt, slow, B, C, D, state * 1e6, 4, numbers([3, 6]).expand(2, -1))
    alone, _ = ssd(x[:, 3:], dt[:, 3:], slow, B[:, 3:], C[:, 3:], D, None, 4)
    same(y[:, 3:], alone)


@given(cut=cuts, width=st.integers(1, 5), bias=st.booleans(), seed=st.integers(0, 99))
def test_a_packed_convolution_is_torchs_of_each_document(cut: list[int], width: int, bias: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, sum(cut), 3), (3, 1, width), (3,), (2, width - 1, 3)
    x, weight, b, window = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "CACHED", 1)  # pieces of 8
        found, _ = causal_conv(x, weight[:, 0].mT, b if bias else None, window, numbers(cut).expand(2, -1))
    alone = []
    for index, piece in enumerate(x.split(cut, 1)):
        seen = torch.cat([window if index == 0 else torch.zeros_like(window), piece], 1).transpose(1, 2)
        alone.append(torch.nn.functional.conv1d(seen, weight, b if bias else None, groups=3).transpose(1, 2))
    expected = torch.nn.functional.silu(torch.cat(alone, 1))
    same(found, expected)
    wanted = [x, weight, *([b] if bias else []), *([window] if width > 1 else [])]
    ours, theirs = (torch.autograd.grad((y * random(y)).sum(), wanted) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        same(one, other, "gradient")


# ---- the model


def check_model(
    model: NemotronH, widths: Widths | None, cut: list[int], alone: Callable[[Tensor], Tensor] | None, seed: int
) -> None:
    """Packed logits and gradients against documents that are run one at a time, by `alone` or by the model itself."""
    ids = stock.tokens(model.architecture.vocab_size, 2, sum(cut), seed)
    packed = model(ids, widths, documents_BL=numbers(cut, reused=True).expand(2, -1)).logits
    unpacked = torch.cat([model(piece, widths).logits for piece in ids.split(cut, 1)], 1)
    stock.assert_same(packed, unpacked, what="packed against unpacked")
    if alone is not None:
        expected = torch.cat([alone(piece) for piece in ids.split(cut, 1)], 1)
        stock.assert_same(packed, expected, what="packed against stock, document by document")
    parameters = list(model.parameters())
    ours, theirs = (
        torch.autograd.grad((y * random(y)).sum(), parameters, allow_unused=True) for y in (packed, unpacked)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other.abs().max() > 1e-12:
            stock.assert_same(one, other, what="gradient")


def chunks_of(patch: pytest.MonkeyPatch, chunk: int) -> None:
    patch.setattr(mamba2, "ssd", partial(ssd, chunk=chunk))


@given(architectures(), cuts, st.integers(0, 99), st.integers(1, 9))
def test_packed_documents_are_stocks_alone(
    fresh: Fresh, architecture: Architecture, cut: list[int], seed: int, chunk: int
) -> None:
    directory = fresh()
    theirs = stock.float64(stock.save(architecture, directory, seed))
    model = nestling.load(directory, dtype=torch.float64).model.requires_grad_(True)
    with pytest.MonkeyPatch.context() as patch:
        chunks_of(patch, chunk)
        check_model(model, None, cut, partial(stock.logits, theirs), seed)


def random_model(architecture: Architecture, seed: int) -> NemotronH:
    model = NemotronH(architecture, dtype=torch.float64)
    stock.randomize(model, seed)
    return model


@given(data=st.data(), cut=cuts, seed=st.integers(0, 99), chunk=st.integers(1, 9))
def test_packed_documents_in_a_prefix(data: st.DataObject, cut: list[int], seed: int, chunk: int) -> None:
    architecture = data.draw(architectures(needs="M*"))
    widths = hard(architecture, data.draw(submodels(architecture, layers=True)))
    with pytest.MonkeyPatch.context() as patch:
        chunks_of(patch, chunk)
        check_model(random_model(architecture, seed), widths, cut, None, seed)


def soft(architecture: Architecture, seed: int) -> Widths:
    """Random masks on every maskable axis."""
    full = architecture.sizes()
    generator = torch.Generator().manual_seed(seed)
    masks = {axis: torch.rand(full[axis], generator=generator, dtype=torch.float64) for axis in "dhpqf"}
    width = Width(full, full, masks, gate=0.8)
    return Widths(width, tuple((layer, width) for layer in range(len(architecture.hybrid_override_pattern))))


@given(architectures(needs="M*"), cuts, st.integers(0, 99), st.integers(1, 9))
@settings(max_examples=10)
def test_packed_documents_with_soft_masks(architecture: Architecture, cut: list[int], seed: int, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        chunks_of(patch, chunk)
        check_model(random_model(architecture, seed), soft(architecture, seed), cut, None, seed)


def hybrid(seed: int = 0) -> NemotronH:
    return random_model(stock.TINY, seed)


@torch.no_grad()
def test_rows_may_be_cut_differently_and_padded_on_either_side() -> None:
    model, pieces = hybrid(), [[5, 3], [2], [4]]
    rows = [[stock.tokens(16, 1, size, seed=size)[0] for size in sizes] for sizes in pieces]
    padding = [torch.zeros(count, dtype=torch.long) for count in (0, 6, 4)]
    ids = torch.stack([torch.cat(rows[0]), torch.cat([padding[1], *rows[1]]), torch.cat([*rows[2], padding[2]])])
    mask = torch.tensor([[1] * 8, [0] * 6 + [1] * 2, [1] * 4 + [0] * 4])
    documents = torch.tensor([[1] * 5 + [2] * 3, [1] * 8, [1] * 8])  # padding is told from a document by the mask alone
    found = model(ids, attention_mask_BS=mask, documents_BL=documents).logits
    for row, first in ((0, 0), (1, 6), (2, 0)):
        expected = torch.cat([model(piece[None]).logits[0] for piece in rows[row]])
        stock.assert_same(found[row, first : first + len(expected)], expected, what=f"row {row}")


def test_a_change_before_a_boundary_is_not_seen_behind_it() -> None:
    model, ids = hybrid(), stock.tokens(16, 1, 12)
    changed = ids.clone()
    changed[:, :5] = 15 - changed[:, :5]
    with torch.no_grad():
        packed, other = (model(row, documents_BL=numbers([5, 7])[None]).logits for row in (ids, changed))
        joined, joined_other = model(ids).logits, model(changed).logits
    stock.assert_same(packed[:, 5:], other[:, 5:], 1e-13)
    with pytest.raises(stock.Differs):
        stock.assert_same(joined[:, 5:], joined_other[:, 5:], 1e-3)


def test_checkpointed_blocks_see_the_documents() -> None:
    model, ids, documents = hybrid(), stock.tokens(16, 2, 9), numbers([4, 5]).expand(2, -1)
    plain = torch.autograd.grad(model(ids, documents_BL=documents).logits.square().sum(), list(model.parameters()))
    model.gradient_checkpointing = True
    again = torch.autograd.grad(model(ids, documents_BL=documents).logits.square().sum(), list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_documents_with_a_cache_or_of_another_shape_are_refused() -> None:
    model, ids = hybrid(), stock.tokens(16, 2, 9)
    with pytest.raises(NestlingError, match="a cache continues one document"):
        model(ids, cache=Cache(), documents_BL=torch.zeros_like(ids))
    with pytest.raises(NestlingError, match=r"documents_BL is \[2, 8\], the input ids are \[2, 9\]: give every input"):
        model(ids, documents_BL=torch.zeros_like(ids)[:, 1:])
