"""Heads left out one at a time equal stock models from which the same part was taken by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

import stock
from calibrated import HYBRID, calibration, opened, texts
from nestling.arch.architecture import Architecture
from nestling.train.ablation import head_sums, planned
from nestling.train.importance import Method, rank
from nestling.train.partial import Partial


def gone(model: torch.nn.Module, layer: int, group: int, head: int) -> None:
    """Take one head out of a stock model in place: no output, and its group's gated norm sees only the others."""
    mixer = model.model.layers[layer].mixer
    if HYBRID.hybrid_override_pattern[layer] == "*":
        mixer.o_proj.weight.data.view(16, 2, 4, 4)[:, group, head] = 0
        return
    rows = slice(16 * group + 4 * head, 16 * group + 4 * head + 4)
    mixer.out_proj.weight.data[:, rows] = 0

    def norm(hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The grouped norm, written out, over three of the group's four heads."""
        hidden = (hidden * torch.nn.functional.silu(gate)).clone()
        hidden[..., rows] = 0
        grouped = hidden.unflatten(-1, (2, 16))
        counts = torch.tensor([12.0 if g == group else 16.0 for g in range(2)]).to(hidden)
        scale = (grouped.pow(2).sum(-1) / counts + HYBRID.layer_norm_epsilon).rsqrt()
        return (grouped * scale[..., None]).flatten(-2) * mixer.norm.weight

    mixer.norm.forward = norm


def test_each_head_is_judged_by_the_stock_model_without_it(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")

    def logits(*head: int) -> torch.Tensor:
        model = stock.float64(stock.load(tmp_path / "m"))
        if head:
            gone(model, *head)
        return torch.cat([stock.logits(model, row[None])[0] for row in texts()])

    full = logits()
    with torch.no_grad():
        found = head_sums(opened(tmp_path / "m"), calibration(), ("h", "q"), Partial())
    assert found.keys() == {"scale", "h.0", "h.3", "q.2", "q.4"}
    for key in ("h.0", "h.3", "q.2", "q.4"):
        assert found[key].shape == (2, 2, 4)
        for head in [(0, 0), (0, 3), (1, 2)]:
            error = (logits(int(key[2:]), *head) - full).square().sum()
            np.testing.assert_allclose(found[key].sum(0)[head], error, rtol=1e-8, err_msg=f"{key} {head}")
    np.testing.assert_allclose(found["scale"].sum(), full.square().sum(), rtol=1e-8)


def test_ablation_orders_heads_and_costs_what_was_planned(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    model, computed = opened(tmp_path / "m"), []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: computed.append(1))
    method = Method.of({"mamba_heads": "ablation"}, "cosine")
    ranking = rank(model, calibration(), method)
    batches = len(calibration())
    assert len(computed) == batches * (6 + planned(HYBRID, {0: "h", 3: "h"}) + 6)  # widths, heads, cosine
    for key in ("h.0", "h.3"):
        assert (np.diff(np.take_along_axis(ranking.scores[key], ranking.orders[key], -1)) <= 0).all()
        assert (ranking.scores[key] > 0).all()
        assert -1 <= ranking.stability[key] <= 1


@pytest.mark.parametrize(("heads", "layers"), [(4, 2 * 5 + 4 * 5 + 4 * 2), (8, 2 * 5 + 8 * 5 + 8 * 2)])
def test_the_plan_counts_a_branch_per_head(heads: int, layers: int) -> None:
    architecture = Architecture("M--M-", hidden_size=8, n_groups=2, mamba_num_heads=heads, mamba_head_dim=2)
    assert planned(architecture, {0: "h", 3: "h"}) == layers
