"""masked = viewed = sliced and loaded in stock transformers, for every axis alone and all together.

The three ways to run a sub-model share no path: masks on the activations of the whole model, prefix views of its
weights, and a checkpoint that the slicer wrote, run by stock transformers. A fourth is pruned by hand. All in float64.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nestling
import stock
from nestling.arch.architecture import Architecture
from nestling.arch.submodel import WHOLE, Submodel
from nestling.infer.family import Family
from nestling.model.width import Width, Widths, hard, masked
from strategies import OF_KIND, architectures, submodels

Fresh = Callable[[], Path]
PER_LAYER = ("intermediate_size", "num_attention_heads")


def agree(
    directory: Path, architecture: Architecture, submodel: Submodel, seed: int, hetero: str = "auto", **config: object
) -> None:
    """Check that all ways to run a sub-model give the same logits."""
    whole = stock.save(architecture, directory / "whole", seed, **config)
    family = nestling.load(directory / "whole", dtype=torch.float64)
    ids = stock.tokens(architecture.vocab_size, seed=seed)
    viewed = family[submodel](ids).logits
    full_cost = family.model(ids, masked(architecture, submodel, torch.float64)).logits
    nestling.slice(directory / "whole", submodel, directory / "cut", hetero=hetero)
    sliced = stock.logits(stock.float64(stock.load(directory / "cut")), ids)
    by_hand = stock.prune(stock.float64(whole), stock.picks(architecture, submodel))
    stock.assert_same(viewed, full_cost, what="viewed against masked")
    stock.assert_same(viewed, sliced, what="viewed against sliced")
    stock.assert_same(sliced, stock.logits(by_hand, ids), what="sliced against pruned by hand")


@pytest.mark.parametrize("field", ["hidden_size", *OF_KIND])
@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=12)
def test_every_axis_alone(fresh: Fresh, field: str, data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures(needs=OF_KIND.get(field, "M"), least=2))
    submodel = data.draw(submodels(architecture, fields=(field,)))
    assert getattr(submodel, field) < getattr(architecture, field)
    agree(fresh(), architecture, submodel, seed)


@given(data=st.data(), seed=st.integers(0, 99), tied=st.booleans())
@settings(max_examples=25)
def test_all_axes_and_depth_together(fresh: Fresh, data: st.DataObject, seed: int, tied: bool) -> None:
    architecture = data.draw(architectures(needs="M*-E", max_layers=6))
    submodel = data.draw(submodels(architecture, layers=True))
    agree(fresh(), architecture, submodel, seed, tie_word_embeddings=tied)


@given(data=st.data(), seed=st.integers(0, 99))
def test_depth_alone(fresh: Fresh, data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures(needs="M*"))
    agree(fresh(), architecture, data.draw(submodels(architecture, fields=(), layers=True)), seed)


@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_sizes_per_layer_padded_with_zeros(fresh: Fresh, data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures(needs="**--", max_layers=6, least=2))
    layers = data.draw(st.booleans())
    submodel = data.draw(submodels(architecture, per_layer=PER_LAYER, layers=layers))
    agree(fresh(), architecture, submodel, seed, hetero="pad")


@given(data=st.data(), seed=st.integers(0, 99))
def test_mamba_heads_per_layer_run_though_no_stock_config_holds_them(
    fresh: Fresh, data: st.DataObject, seed: int
) -> None:
    architecture = data.draw(architectures(needs="MM", least=2))
    submodel = data.draw(submodels(architecture, per_layer=("mamba_num_heads", *PER_LAYER)))
    directory = fresh()
    whole = stock.save(architecture, directory, seed)
    family = nestling.load(directory, dtype=torch.float64)
    ids = stock.tokens(architecture.vocab_size, seed=seed)
    viewed = family[submodel](ids).logits
    by_hand = stock.prune(stock.float64(whole), stock.picks(architecture, submodel))
    stock.assert_same(viewed, stock.logits(by_hand, ids), what="viewed against pruned by hand")
    stock.assert_same(viewed, family.model(ids, masked(architecture, submodel, torch.float64)).logits)


HYBRID = Architecture(
    "M-M*-*",
    vocab_size=31,
    hidden_size=24,
    intermediate_size=20,
    n_groups=2,
    mamba_num_heads=6,
    mamba_head_dim=4,
    ssm_state_size=5,
    num_key_value_heads=2,
    num_attention_heads=6,
    head_dim=4,
    use_bias=True,
    mlp_bias=True,
)
SMALL = Submodel(
    layers=(0, 1, 3, 4, 5),
    hidden_size=16,
    intermediate_size=(8, 12),
    mamba_num_heads=4,
    mamba_head_dim=3,
    num_attention_heads=(2, 4),
)


def family(directory: Path) -> Family:
    stock.save(HYBRID, directory)
    return nestling.load(directory, dtype=torch.float64)


def test_float32_agrees_to_a_hundred_thousandth(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "whole")
    opened, ids = nestling.load(tmp_path / "whole"), stock.tokens(31, length=30)
    nestling.slice(tmp_path / "whole", SMALL, tmp_path / "cut", hetero="pad")
    sliced = stock.logits(stock.load(tmp_path / "cut"), ids)
    stock.assert_same(opened[SMALL](ids).logits, sliced, 1e-5)
    stock.assert_same(opened.model(ids, masked(HYBRID, SMALL)).logits, sliced, 1e-5)


def test_a_submodel_is_not_the_whole_model(tmp_path: Path) -> None:
    opened, ids = family(tmp_path), stock.tokens(31)
    with pytest.raises(stock.Differs) as caught:
        stock.assert_same(opened[SMALL](ids).logits, opened["100%"](ids).logits)
    assert caught.value.difference > 0.1


def test_the_whole_model_has_no_masks(tmp_path: Path) -> None:
    for widths in (hard(HYBRID), masked(HYBRID, WHOLE)):
        assert [layer for layer, _ in widths.layers] == list(range(6))
        assert all(not width.masks and width.gate == 1 for _, width in widths.layers)
    opened, ids = family(tmp_path), stock.tokens(31)
    assert torch.equal(opened.model(ids).logits, opened["100%"](ids).logits)


# ---- gradients


def objective(logits: torch.Tensor) -> torch.Tensor:
    """Some function of all logits."""
    weight = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(2))
    return (logits * weight).sum()


def gradients(opened: Family, widths: Widths) -> dict[str, torch.Tensor]:
    """Of every parameter; zero where it took no part."""
    model = opened.model.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    objective(model(stock.tokens(model.architecture.vocab_size), widths).logits).backward()
    found: dict[str, torch.Tensor | list[torch.Tensor]] = {}
    for name, value in model.on_disk().items():
        own = torch.zeros_like(value) if value.grad is None else value.grad
        if (stacked := re.sub(r"experts\.\d+\.(\w+)\.weight", r"experts.\1", name)) != name:  # as stock keeps them
            found.setdefault(stacked, []).append(own)
        elif not name.endswith("e_score_correction_bias"):
            found[name] = own
    return {name: torch.stack(value) if isinstance(value, list) else value for name, value in found.items()}


def gradients_by_hand(
    whole: nn.Module, architecture: Architecture, submodel: Submodel
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(gradient, whether it was kept) of every element of a stock model in float64, whose weights are lost.

    Stock's gradients of the model pruned by hand, each put back where its element was taken from, among zeros.
    """
    picks = stock.picks(architecture, submodel)
    pruned = stock.prune(whole, picks)
    objective(pruned(stock.tokens(architecture.vocab_size), use_cache=False).logits).backward()
    names, first = {}, 0
    with torch.no_grad():  # number all elements, and prune the numbers
        for name, parameter in whole.named_parameters():
            numbers = torch.arange(first, first + parameter.numel(), dtype=torch.float64)
            names[name.replace("model.", "backbone.", 1)] = parameter.copy_(numbers.view_as(parameter)).shape
            first += parameter.numel()
    spread, kept = torch.zeros(first, dtype=torch.float64), torch.zeros(first).bool()
    for number, value in zip(stock.prune(whole, picks).parameters(), pruned.parameters(), strict=True):
        spread[number.long().flatten()] = value.grad.flatten()
        kept[number.long().flatten()] = True
    sizes = [shape.numel() for shape in names.values()]
    parts = zip(names.items(), spread.split(sizes), kept.split(sizes), strict=True)
    return {name: (part.view(shape), inside.view(shape)) for (name, shape), part, inside in parts}


def check_gradients(directory: Path, architecture: Architecture, submodel: Submodel, seed: int) -> int:
    """Views and masks have stock's gradients on the prefix and none elsewhere; returns how many tensors have none."""
    whole = stock.float64(stock.save(architecture, directory / "whole", seed))
    opened = nestling.load(directory / "whole", dtype=torch.float64)
    expected = gradients_by_hand(whole, architecture, submodel)
    for way, widths in (
        ("views", hard(architecture, submodel)),
        ("masks", masked(architecture, submodel, torch.float64)),
    ):
        found = gradients(opened, widths)
        assert found.keys() == expected.keys()
        for name, (wanted, kept) in expected.items():
            assert not found[name][~kept].any(), f"{way}: {name} has a gradient outside the prefix"
            if wanted.any():
                stock.assert_same(found[name], wanted, what=f"{way}: {name}")
    return sum(not kept.any() for _, kept in expected.values())


def test_hard_and_masked_gradients_are_equal_on_the_prefix_and_zero_elsewhere(tmp_path: Path) -> None:
    assert check_gradients(tmp_path, HYBRID, SMALL, 0) == 11  # the tensors of the dropped layer


@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_gradients_of_any_sub_model_of_any_model(fresh: Fresh, data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures(needs="M*-E", max_layers=6))
    submodel = data.draw(submodels(architecture, per_layer=PER_LAYER, layers=True))
    check_gradients(fresh(), architecture, submodel, seed)


# ---- widths


def test_masks_weigh_trailing_axes() -> None:
    mask = torch.tensor([1.0, 0.5, 0.0])
    width = Width({"h": 2, "p": 3}, {"h": 2, "p": 3}, {"p": mask})
    x = torch.ones(4, 2, 3)
    assert torch.equal(width.mask(x, "h", "p"), mask.expand(4, 2, 3))
    assert torch.equal(width.mask(x.mT, "p", "h"), mask[:, None].expand(4, 3, 2))
    assert float(width.active("h", "p")) == 2 * 1.5


def test_soft_masks_are_differentiable(tmp_path: Path) -> None:
    opened, ids = family(tmp_path), stock.tokens(31)
    soft = torch.full((HYBRID.hidden_size,), 0.7, dtype=torch.float64, requires_grad=True)

    def widths(mask: torch.Tensor) -> Widths:
        full = HYBRID.sizes()
        width = Width(full, full, {"d": mask})
        return Widths(width, tuple((layer, width) for layer in range(6)))

    opened.model(ids, widths(soft)).logits.square().sum().backward()
    assert soft.grad is not None
    assert (soft.grad.abs() > 0).all()
    ones = opened.model(ids, widths(torch.ones_like(soft))).logits
    stock.assert_same(ones, opened["100%"](ids).logits)
