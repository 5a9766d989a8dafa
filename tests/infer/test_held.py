"""Prefixes that were looked up once, and products of a few tokens: the same numbers as products of packed weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stock
from nestling.arch.architecture import Architecture
from nestling.arch.axes import Layout
from nestling.arch.submodel import Submodel
from nestling.infer.family import View
from nestling.model.cache import Cache
from nestling.model.native import library
from nestling.model.native.layer import Bound
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import Width, prefix
from strategies import architectures, submodels

FULL = 2**40
IN_PIECES = Submodel(hidden_size=8, mamba_head_dim=2, mamba_num_heads=2, num_attention_heads=1)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[Architecture, Submodel]:
    architecture = draw(architectures(needs="M*-", least=2))
    return architecture, draw(submodels(architecture, layers=draw(st.booleans())))


def model(architecture: Architecture, dtype: torch.dtype = torch.float64) -> NemotronH:
    found = NemotronH(architecture, dtype=dtype)
    stored = stock.on_disk(stock.build(architecture))
    for name, parameter in found.on_disk().items():
        parameter.data.copy_(stored[name])
        if "dt_bias" in name:  # a softplus that is nothing, and one that is almost a line
            parameter.data += torch.linspace(-4, 9, len(parameter))
    return found.eval().requires_grad_(False)


@given(sizes())
def test_a_few_tokens_are_many_tokens_held_or_not(size: tuple[Architecture, Submodel]) -> None:
    architecture, submodel = size
    view = View(model(architecture), submodel)
    ids = stock.tokens(architecture.vocab_size, batch=3, length=17)
    packed = view(ids).logits  # more tokens than FEW: the path that the stock oracle checks
    for other in (view, view.held(), view.held(FULL)):
        stock.assert_same(other(ids).logits, packed)
        stock.assert_same(other(ids[:1, :5]).logits, packed[:1, :5])


LARGE = Architecture(
    "M*-M",
    vocab_size=90,
    hidden_size=84,
    intermediate_size=150,
    n_groups=2,
    mamba_num_heads=6,
    mamba_head_dim=20,
    ssm_state_size=40,
    num_key_value_heads=2,
    num_attention_heads=6,
    head_dim=20,
)
"""Of several vectors of any machine, and a part of one."""


def as_decoded(view: View, ids: torch.Tensor) -> torch.Tensor:
    """The logits of two prompts, and of tokens that follow one at a time."""
    cache = Cache()
    parts = ids.split([9, 6, *(1,) * (ids.shape[1] - 15)], 1)
    return torch.cat([view(part, cache=cache).logits for part in parts], 1)


@given(sizes())
@torch.no_grad()
def test_layers_as_one_kernel_are_their_operations(size: tuple[Architecture, Submodel]) -> None:
    architecture, submodel = size
    exact, view = (View(model(architecture, dtype), submodel) for dtype in (torch.float64, torch.float32))
    ids = stock.tokens(architecture.vocab_size, batch=3, length=17)
    for rows in (ids[:1], ids):
        found, expected = as_decoded(view.held(), rows), as_decoded(exact, rows)
        assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("submodel", [Submodel(), Submodel(None, 70, 101, 4, mamba_head_dim=19)])
@pytest.mark.parametrize("batch", [1, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_layers_as_one_kernel_on_whole_vectors(submodel: Submodel, batch: int, dtype: torch.dtype) -> None:
    exact, one_by_one = View(model(LARGE, dtype).double(), submodel), View(model(LARGE, dtype), submodel)
    view = one_by_one.held()
    if library.library() is not None:
        bound = [width.bound is not None for _, width in view.widths.layers]
        assert bound == [True, False, True, True]
    ids = stock.tokens(LARGE.vocab_size, batch=batch, length=19)
    caches, wrong = [Cache(), Cache(), Cache()], []
    for part in ids.split([3, 9, 3, *(1,) * 4], 1):
        found, rounded, expected = (
            each(part, cache=cache).logits for each, cache in zip((view, one_by_one, exact), caches, strict=True)
        )
        wrong.append(torch.stack([(each - expected).norm(dim=-1) / expected.norm(dim=-1) for each in (found, rounded)]))
    ours, others = torch.cat(wrong, 2).flatten(1).median(1).values  # norms of next to nothing make single ones large
    assert ours <= (2e-6 if dtype == torch.float32 else others)  # operations one by one round more often
    if dtype == torch.float32:
        for layer, state in caches[2].layers.items():
            for name, value in state.items():
                assert (caches[0].layers[layer][name] - value).norm() <= 1e-5 * value.norm()


@torch.no_grad()
def test_what_a_layer_writes_in_bfloat16_is_rounded_as_torch_rounds() -> None:
    if library.library() is None:
        pytest.skip("no C++ compiler here")
    generator = torch.Generator().manual_seed(0)
    x, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in ((1, 60, 33), (33,)))
    bias = torch.where(torch.arange(33) % 2 == 0, x[0, 0].abs() * 2.0**-9, bias)  # halves between two numbers
    nothing = torch.zeros(8, 33).bfloat16(), torch.zeros(33, 8).bfloat16()
    layer = Bound.of("mlp", torch.ones(33), 1e-5, [(nothing[0], None), (nothing[1], bias)])
    assert layer is not None
    torch.testing.assert_close(layer(x), x + bias, rtol=0, atol=0)


def test_no_matrix_is_copied_where_kernels_read_it() -> None:
    if library.library() is None:
        pytest.skip("no C++ compiler here")
    view = View(model(stock.TINY, torch.float32), IN_PIECES).held(FULL)
    storages = {value.untyped_storage().data_ptr() for value in view.model.parameters()}
    widths = [width for _, width in view.widths.layers]
    matrices = [tensor for width in widths for tensor in width.held.values() if tensor.ndim == 2]
    assert all(tensor.untyped_storage().data_ptr() in storages for tensor in matrices)
    assert sum(len(width.pieces) for width in widths) == 2  # in_proj and out_proj; o_proj has one head per key


def test_a_plain_prefix_is_one_step_from_its_weight() -> None:
    """Each step back makes a gradient of the whole, zero where nothing was kept."""
    whole, layout = stock.TINY.sizes(), Layout(((("f",),), (("d",),)))
    weight = torch.randn(whole["f"], whole["d"], requires_grad=True)
    part = prefix(weight, layout, Width(whole, whole | {"f": 5, "d": 3}))
    assert torch.equal(part, weight[:5, :3])
    assert part.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    ((before, _),) = part.grad_fn.next_functions  # type: ignore[union-attr]
    assert before.variable is weight
    part.sum().backward()
    assert weight.grad is not None
    assert weight.grad[:5, :3].eq(1).all()
    assert weight.grad.sum() == 15
    assert prefix(weight, layout, Width(whole, whole)) is weight


def test_without_spare_bytes_no_matrix_is_copied() -> None:
    view = View(model(stock.TINY), IN_PIECES)
    storages = {value.untyped_storage().data_ptr() for value in view.model.parameters()}
    largest = 0
    for spare, copies in ((0, 0), (FULL, 2)):
        widths = view.held(spare).widths
        held = [tensor for width in (widths.ends, *(w for _, w in widths.layers)) for tensor in width.held.values()]
        own = [tensor for tensor in held if tensor.untyped_storage().data_ptr() not in storages]
        assert sum(tensor.ndim == 2 for tensor in own) == copies  # in_proj and out_proj; o_proj has one head per key
        largest = sum(tensor.nbytes for tensor in own if tensor.ndim == 2)
    widths = view.held(largest - 1).widths
    assert (
        sum(len(width.held) for _, width in widths.layers)
        == sum(map(len, map(_held, view.held(FULL).widths.layers))) - 1
    )


def _held(layer: tuple[int, object]) -> dict[str, torch.Tensor]:
    return layer[1].held  # type: ignore[attr-defined]
