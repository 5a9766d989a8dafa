"""Compiled blocks compute what the others do, in one graph each, at every hard width and over packed rows."""

import copy

import pytest
import torch
from torch import Tensor

import stock
from nestling.arch.submodel import Submodel
from nestling.model.compiled import compile_blocks
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, while it traces
SMALL = Submodel(hidden_size=12, intermediate_size=16, mamba_num_heads=2, num_attention_heads=1)


@pytest.mark.parametrize(("submodel", "documents"), [(SMALL, None), (Submodel(), torch.tensor([[0] * 4 + [1] * 7]))])
def test_compiled_blocks_have_no_graph_breaks_and_change_nothing(submodel: Submodel, documents: Tensor | None) -> None:
    model = NemotronH(stock.TINY, dtype=torch.float64)
    stock.randomize(model, 0)
    compiled = compile_blocks(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    ids, widths = stock.tokens(16, 1), hard(stock.TINY, submodel)
    found, expected = (each(ids, widths, documents_BL=documents).logits for each in (compiled, model))
    stock.assert_same(found, expected)
    ours, theirs = (
        torch.autograd.grad(logits.square().sum(), list(each.parameters()), allow_unused=True)
        for logits, each in ((found, compiled), (expected, model))
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one is not None
        assert other is not None
        stock.assert_same(one, other, what="gradient")
    assert compiled.on_disk().keys() == model.on_disk().keys()
