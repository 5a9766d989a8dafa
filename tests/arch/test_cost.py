"""Counts against the models and caches that stock transformers builds, and against the published numbers."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import stock
from nestling.arch.architecture import Architecture
from nestling.arch.cost import PRECISIONS, Cost, Precision, cost, parameters, weight_bytes
from nestling.arch.presets import PRESETS
from nestling.arch.submodel import WHOLE, Submodel, standalone
from strategies import architectures, submodels

PUBLISHED = {
    "nemotron-nano-12b-v2": 12_310_001_152,
    "nemotron-nano-9b-v2": 8_888_227_328,
    "nemotron-h-8b": 8_100_852_736,
    "nemotron-h-4b": 4_489_223_040,
    "nemotron-3-nano-4b": 3_973_556_832,
    "nemotron-3-nano-30b-a3b": 31_577_937_344,
    "star-elastic-12b-a2b": 12_426_655_424,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_count_as_published(name: str) -> None:
    assert parameters(PRESETS[name]) == PUBLISHED[name]
    assert cost(PRESETS[name]).parameters == PUBLISHED[name]


def test_every_published_shape_is_a_preset() -> None:
    assert PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_count_as_the_stock_model_on_the_meta_device(name: str) -> None:
    assert stock.numel(stock.on_meta(PRESETS[name])) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "billions"), [("nemotron-3-nano-30b-a3b", 3.58), ("star-elastic-12b-a2b", 2.08), ("nemotron-h-8b", 8.10)]
)
def test_active_parameters_as_published(name: str, billions: float) -> None:
    assert round(cost(PRESETS[name]).active_parameters / 1e9, 2) == billions


@given(architectures())
def test_parameters_are_the_numel_of_the_stock_model(architecture: Architecture) -> None:
    assert parameters(architecture) == stock.numel(stock.on_meta(architecture))


@given(st.data())
def test_parameters_of_a_submodel_are_the_numel_of_a_stock_model_of_its_sizes(data: st.DataObject) -> None:
    architecture = data.draw(architectures())
    submodel = data.draw(submodels(architecture, layers=True))
    model = stock.on_meta(standalone(architecture, submodel))
    assert parameters(architecture, submodel) == stock.numel(model)
    assert parameters(standalone(architecture, submodel)) == stock.numel(model)


@given(st.data())
def test_sizes_per_layer_count_as_stock_blocks_of_those_sizes(data: st.DataObject) -> None:
    architecture = data.draw(architectures(needs="M*--"))
    mixed = ("intermediate_size", "num_attention_heads", "mamba_num_heads")
    submodel = data.draw(submodels(architecture, fields=("hidden_size",), per_layer=mixed, layers=True))
    model = stock.build(architecture)
    by_hand = stock.prune(model, stock.picks(architecture, submodel))
    assert parameters(architecture, submodel) == stock.numel(by_hand)


def test_tied_embeddings_count_once() -> None:
    architecture = PRESETS["nemotron-h-4b"]
    tied = replace(architecture, untied=False)
    assert parameters(architecture) - parameters(tied) == 131072 * 3072
    assert cost(tied).flops_per_token == cost(architecture).flops_per_token


@given(architectures(needs="E"))
def test_active_parameters_leave_out_the_experts_not_chosen(architecture: Architecture) -> None:
    model = stock.on_meta(architecture)
    routed = sum(value.numel() for name, value in model.named_parameters() if ".experts." in name)
    each = routed // architecture.n_routed_experts
    idle = (architecture.n_routed_experts - architecture.num_experts_per_tok) * each
    assert cost(architecture).active_parameters == stock.numel(model) - idle


def bf16(architecture: Architecture) -> torch.nn.Module:
    return stock.build(architecture).to(torch.bfloat16)


def cache_bytes(model: torch.nn.Module, batch: int, length: int) -> tuple[int, int]:
    """Bytes of keys and values, and of Mamba states, in stock's own cache after a forward pass."""
    ids = stock.tokens(model.config.vocab_size, batch, length)
    with torch.no_grad():
        layers = model(ids, use_cache=True).past_key_values.layers
    keys = [tensor for layer in layers for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    states = [
        tensor
        for layer in layers
        for kind in ("conv_states", "recurrent_states")
        for tensor in getattr(layer, kind, {}).values()
    ]
    return sum(t.nbytes for t in keys if t is not None), sum(t.nbytes for t in states if t is not None)


@given(st.data())
@settings(max_examples=10)
def test_bytes_are_those_of_stock_weights_and_caches(data: st.DataObject) -> None:
    architecture = data.draw(architectures(needs="M*"))
    submodel = data.draw(submodels(architecture, fields=("mamba_num_heads", "num_attention_heads", "mamba_head_dim")))
    model = bf16(standalone(architecture, submodel))
    found = cost(architecture, submodel)
    assert found.bytes == sum(parameter.nbytes for parameter in model.parameters())
    keys, states = cache_bytes(model, batch=2, length=6)
    assert keys == found.kv_bytes_per_token * 2 * 6
    assert states == found.ssm_bytes_per_sequence * 2


def test_a_cache_at_a_context_length_is_stocks() -> None:
    architecture = Architecture(
        "M**M", 11, 8, 8, 2, 4, 2, 3, 4, num_key_value_heads=2, num_attention_heads=6, head_dim=5
    )
    found, context = cost(architecture), 300
    assert cache_bytes(bf16(architecture), batch=1, length=context) == (
        found.kv_bytes(context),
        found.ssm_bytes_per_sequence,
    )


def linear(module: torch.nn.Module) -> list[torch.Tensor]:
    """The matrices of a module that a quantized checkpoint stores in few bits: linear maps, and each expert's."""
    if isinstance(module, torch.nn.Linear):
        return [module.weight]
    stacks = [value for value in module.parameters(recurse=False) if value.ndim == 3]
    return [] if isinstance(module, torch.nn.Conv1d) else [matrix for stack in stacks for matrix in stack]


def quantized(model: torch.nn.Module, bytes_of: Callable[[torch.Tensor], int]) -> int:
    """Bytes when the linear maps of the blocks take `bytes_of`, and everything else two each."""
    found = [matrix for module in model.model.layers.modules() for matrix in linear(module)]
    rest = stock.numel(model) - sum(matrix.numel() for matrix in found)
    return 2 * rest + sum(map(bytes_of, found))


@given(st.data())
def test_weights_by_precision_are_those_of_stock_modules(data: st.DataObject) -> None:
    architecture = data.draw(architectures())
    submodel = data.draw(submodels(architecture, layers=True))
    model = stock.on_meta(standalone(architecture, submodel))
    expected = {
        "fp32": 4 * stock.numel(model),
        "bf16": 2 * stock.numel(model),
        "fp8": quantized(model, lambda matrix: matrix.numel() + 4),
        "int4": quantized(model, lambda matrix: len(matrix) * ((matrix.shape[1] + 1) // 2 + 2)),  # rows are below 128
    }
    found = {name: weight_bytes(architecture, submodel, precision) for name, precision in PRECISIONS.items()}
    assert found == expected
    assert found["bf16"] == cost(architecture, submodel).bytes


def test_four_bits_by_hand() -> None:
    architecture = Architecture("-", vocab_size=7, hidden_size=4, intermediate_size=259)
    rest = 2 * (28 + 28 + 4 + 4)  # embeddings, head, two norms
    up = 259 * (2 + 2)  # of each row, two bytes of weights and one scale
    down = 4 * (130 + 3 * 2)  # of each row, 259 weights in 130 bytes and a scale per 128
    assert weight_bytes(architecture, WHOLE, PRECISIONS["int4"]) == rest + up + down
    assert weight_bytes(architecture, WHOLE, Precision(8, 2)) == rest + 2 * 4 * 259


def matrices(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight that stock multiplies with: of linear maps, convolutions, routers and expert stacks."""
    for name, value in model.named_parameters():
        if value.ndim > 1 and not name.endswith("embeddings.weight"):
            yield name, value


@given(architectures())
def test_flops_are_two_per_weight_used_and_five_per_state_element(architecture: Architecture) -> None:
    model = stock.on_meta(architecture)
    share = architecture.num_experts_per_tok / architecture.n_routed_experts
    used = sum(value.numel() * (share if ".experts." in name else 1) for name, value in matrices(model))
    state = architecture.mamba_num_heads * architecture.mamba_head_dim * architecture.ssm_state_size
    expected = 2 * used + 5 * state * architecture.hybrid_override_pattern.count("M")
    assert cost(architecture).flops_per_token == round(expected)


def test_flops_at_a_context_are_those_counted_on_a_stock_model() -> None:
    """Without Mamba blocks, whose recurrence this counter does not see."""
    architecture = Architecture("*-*", 11, 8, 8, num_key_value_heads=2, num_attention_heads=6, head_dim=5)
    model = stock.build(architecture, attn_implementation="eager")
    assert decode_flops(model, context=9) == cost(architecture).flops(9)


def decode_flops(model: torch.nn.Module, context: int) -> int:
    """FLOPs of the last of `context` tokens, the others cached."""
    with torch.no_grad():
        cached = model(stock.tokens(11, 1, context - 1), use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counted:
            model(stock.tokens(11, 1, 1), use_cache=True, past_key_values=cached)
    return counted.get_total_flops()


def test_flops_per_context_token_are_what_one_more_cached_token_costs() -> None:
    architecture = Architecture(
        "*-M*", 11, 8, 8, 2, 4, 2, 3, 4, num_key_value_heads=2, num_attention_heads=6, head_dim=5
    )
    model = stock.build(architecture, attn_implementation="eager")
    assert decode_flops(model, 9) - decode_flops(model, 8) == cost(architecture).flops_per_context_token


def test_a_cost_by_hand() -> None:
    architecture = Architecture("-", vocab_size=7, hidden_size=4, intermediate_size=3)
    assert cost(architecture, WHOLE) == Cost(
        parameters=88,  # 28 embeddings, 28 head, 2 norms of 4, 12 up, 12 down
        active_parameters=88,
        bytes=176,
        kv_bytes_per_token=0,
        ssm_bytes_per_sequence=0,
        flops_per_token=104,  # twice the head, up and down
        flops_per_context_token=0,
    )
    assert cost(architecture, Submodel(intermediate_size=1)).parameters == 72
