"""The kernel of attention against a softmax over a dense mask, in float64, and against torch's own."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import stock
from model.test_native import close, inside, with_gradients
from model.test_packed import hybrid
from nestling.model.attention import _attend
from nestling.model.cache import Cache
from nestling.model.context import Context
from nestling.model.native import library
from nestling.model.native.attention import attended, attention

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = torch.float32, torch.float64, torch.bfloat16
LAYOUTS = {
    "side by side": lambda t: t.contiguous(),
    "between other heads": lambda t: inside(t, 2),
    "between other channels": lambda t: inside(t, 3),
    "head by head": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "from a longer row": lambda t: inside(t, 1),
    "channels apart": lambda t: t.mT.contiguous().mT,
    "one row for all": lambda t: t[:1].expand_as(t),
}


def random(batch: int, length: int, groups: int, heads: int, channels: int, seed: int = 0) -> list[Tensor]:
    """query [B, L, G q, c], key and value [B, L, G, c], float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, count, channels) for count in (groups * heads, groups, groups)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def cut(batch: int, length: int, often: float, seed: int = 0) -> Tensor:
    """Documents [B, L] that begin anywhere, in each row elsewhere."""
    return (torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < often).cumsum(1)


def dense(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None = None) -> Tensor:
    """Attention by its definition, one head after the other."""
    places = torch.arange(query.shape[1])
    sees = places[:, None] >= places
    if documents is not None:
        sees = sees & (documents[:, :, None] == documents[:, None])
    shared, found = query.shape[2] // key.shape[2], []
    for head in range(query.shape[2]):
        scores = query[:, :, head] @ key[:, :, head // shared].mT / query.shape[3] ** 0.5
        scores = scores.masked_fill(~sees, -torch.inf)
        weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
        found.append(weights / weights.sum(-1, keepdim=True) @ value[:, :, head // shared])
    return torch.stack(found, 2)


def check(
    values: list[Tensor], documents: Tensor | None, dtype: torch.dtype, layouts: Sequence[str] = ("side by side",) * 3
) -> None:
    """The kernel's outputs and gradients against those of `dense`."""

    def laid(values: Sequence[Tensor]) -> list[Tensor]:
        return [LAYOUTS[layout](value) for layout, value in zip(layouts, values, strict=True)]

    narrow = [value.to(dtype) for value in values]
    expected = with_gradients([value.double() for value in narrow], lambda *given: [dense(*laid(given), documents)])
    found = with_gradients(narrow, lambda *given: [attention(*laid(given), documents)[0]])
    close(found, expected, dtype)
    assert torch.equal(attended(*laid(narrow), documents), found[0])  # without a gradient


@settings(max_examples=150)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 150, 3, 4, 70))),
    often=st.sampled_from([None, 0.02, 0.1, 0.6, 1.0]),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_attention_of_any_size_is_a_softmax(
    sizes: tuple[int, ...], often: float | None, layouts: Sequence[str], dtype: torch.dtype, seed: int
) -> None:
    documents = None if often is None else cut(*sizes[:2], often, seed)
    check(random(*sizes, seed=seed), documents, dtype, layouts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 16, 32, 64, 128])
@pytest.mark.parametrize("length", [63, 64, 65, 128, 129])
def test_sizes_around_a_block(length: int, channels: int, dtype: torch.dtype) -> None:
    check(random(1, length, 1, 2, channels), None, dtype)
    starts = torch.tensor([3, 64, 100])  # right behind an edge of a block, at one, and between
    check(random(1, length, 1, 2, channels), (torch.arange(length)[:, None] >= starts).sum(1)[None], dtype)


@pytest.mark.parametrize("often", [None, 0.005, 0.05])
def test_the_queries_of_a_head_can_be_divided(often: float | None) -> None:
    documents = None if often is None else cut(1, 700, often)
    check(random(1, 700, 1, 2, 8), documents, torch.float64)


def test_attention_is_torchs() -> None:
    values = [value.float() for value in random(2, 200, 2, 3, 32)]

    def torchs(*given: Tensor) -> list[Tensor]:
        heads = (t.transpose(1, 2) for t in given)
        return [F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)]

    close(
        with_gradients(values, lambda *given: [attention(*given, None)[0]]), with_gradients(values, torchs), DTYPES[0]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("often", [None, 0.05])
def test_scores_beyond_what_an_exponential_holds(often: float | None, dtype: torch.dtype) -> None:
    query, key, value = random(2, 150, 1, 2, 24)
    documents = None if often is None else cut(2, 150, often)
    values = [query.to(dtype) * 1e4, key.to(dtype) * 1e4, value.to(dtype)]
    found = with_gradients(values, lambda *given: [attention(*given, documents)[0]])
    assert all(each.isfinite().all() for each in found)
    close(found[:1], [dense(*(each.double() for each in values), documents)], dtype)
    check([30 * query, 30 * key, value], documents, torch.float64)


def test_scores_as_low_as_numbers_go() -> None:
    query, key, value = (t.float() for t in random(1, 100, 1, 1, 16))
    query, key = torch.full_like(query, -1e15), torch.full_like(key, 1e15)
    counts = torch.arange(1, 101)[None, :, None, None]
    torch.testing.assert_close(attended(query, key, value, None), value.cumsum(1) / counts, rtol=1e-5, atol=1e-5)


def test_what_is_not_a_number_is_told() -> None:
    query, key, value = random(1, 150, 1, 2, 16)
    key[:, 40] = value[:, 110] = torch.nan
    lost = attended(query, key, value, torch.arange(150)[None] // 75).isnan()[0].all(-1).all(-1)
    assert lost[40:75].all()
    assert lost[110:].all()
    assert not lost[:36].any()
    assert not lost[75:106].any()


def test_packed_documents_are_those_alone() -> None:
    values, sizes = random(2, 150, 2, 2, 20), [1, 70, 1, 1, 64, 13]
    documents = torch.cat([torch.full((size,), number % 2) for number, size in enumerate(sizes)]).expand(2, -1)

    def alone(*given: Tensor) -> list[Tensor]:
        pieces = zip(*(t.split(sizes, 1) for t in given), strict=True)
        return [torch.cat([attention(*piece, None)[0] for piece in pieces], 1)]

    packed = with_gradients(values, lambda *given: [attention(*given, documents)[0]])
    close(packed, with_gradients(values, alone), torch.float64)


@pytest.mark.parametrize("often", [None, 0.02])
def test_any_number_of_threads_gives_the_same_bits(often: float | None) -> None:
    values = [value.float() for value in random(1, 600, 1, 3, 32)]
    documents, before, found = None if often is None else cut(1, 600, often), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(with_gradients(values, lambda *given: [attention(*given, documents)[0]]))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, another) for one, another in zip(found[0], other, strict=True))


def test_torch_knows_what_the_operation_returns() -> None:
    values = [value.requires_grad_() for value in random(2, 20, 2, 2, 6)]
    torch.library.opcheck(attention, (*values, cut(2, 20, 0.2)))
    query, key, value = (value.detach() for value in values)
    value.requires_grad_()  # the gradient of one input alone
    (found,) = torch.autograd.grad(attention(query, key, value, None)[0].square().sum(), value)
    (expected,) = torch.autograd.grad(dense(query, key, value).square().sum(), value)
    close([found], [expected], torch.float64)


def test_what_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, documents = torch.zeros(2, 9, 4), cut(2, 9, 0.3)
    full, one = Cache(length=3), torch.zeros(2, 1, 4)
    assert Context.of(x, None, None).kernel
    assert Context.of(x, Cache(), None).kernel
    packed = Context.of(x, None, None, documents_BL=documents)
    assert packed.kernel
    assert packed.attend_B1LS is None
    assert packed.apart is None
    mask = torch.ones(2, 9, dtype=torch.long)
    for given_ in ((x, full, None), (x, None, mask), (one, None, None), (one, full, None), (x.half(), None, None)):
        assert not Context.of(*given_).kernel
    assert Context.of(x.bfloat16(), None, None).kernel
    with torch.autocast("cpu", torch.bfloat16):
        assert Context.of(x, None, None).kernel
        assert Context.of(x, None, None, documents_BL=documents).kernel
    with torch.autocast("cpu", torch.float16):
        assert not Context.of(x, None, None).kernel
        assert not Context.of(x.bfloat16(), None, None).kernel
    monkeypatch.setattr(library, "library", lambda: None)
    assert not Context.of(x, None, None).kernel
    assert Context.of(x, None, None, documents_BL=documents).attend_B1LS is not None


def test_keys_of_a_cache_that_is_wider_than_the_queries() -> None:
    query, key, value = (t.bfloat16().transpose(1, 2) for t in random(2, 70, 1, 2, 16))
    expected = _attend(query, key, value, Context(None, None, kernel=True))
    assert torch.equal(_attend(query, key.float(), value.float(), Context(None, None, kernel=True)), expected)


@torch.inference_mode()
def test_a_model_says_the_same_with_kernels_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, documents = hybrid(), stock.tokens(16, 2, 90), cut(2, 90, 0.05)
    said = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(library, "library", lambda: None)
        cache = Cache()
        first = model(ids[:, :70], cache=cache).logits
        said.append([model(ids, documents_BL=documents).logits, first, model(ids[:, 70:], cache=cache).logits])
    for one, other in zip(*said, strict=True):
        stock.assert_same(one, other)
