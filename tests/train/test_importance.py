"""A ranking: orders, what it does to a checkpoint, how it is resumed, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stock
from calibrated import HYBRID, calibration, opened
from nestling.arch.architecture import Architecture
from nestling.errors import NestlingError
from nestling.model.nemotron_h import NemotronH
from nestling.train.depth import METHODS
from nestling.train.importance import Method, rank
from nestling.train.metrics import AXES, METRICS
from nestling.weights.ranking import Ranking
from nestling.weights.transform import permute
from strategies import architectures


def test_padding_does_not_count(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    one, other = (rank(opened(tmp_path / "m"), calibration(padding)) for padding in (0, 17))
    for key, score in one.scores.items():
        np.testing.assert_allclose(score, other.scores[key], rtol=1e-12, err_msg=key)


def test_watching_changes_nothing(tmp_path: Path, each_path: str) -> None:
    stock.save(HYBRID, tmp_path / "m")
    model, seen = opened(tmp_path / "m"), []
    ids = stock.tokens(29)
    watched = model(ids, watch=lambda layer, site, x: seen.append((layer, site, tuple(x.shape)))).logits
    rounding = 1e-12 if each_path == "kernels" else 0  # of a kernel whose steps are taken one by one
    torch.testing.assert_close(watched, model(ids).logits, rtol=rounding, atol=rounding)
    assert {site for _, site, _ in seen} == {"norm", "x", "gated", "up", "hidden", "heads"}
    assert (None, "norm", (2, 11, 16)) in seen


def test_an_order_is_its_scores_descending(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    ranking = rank(opened(tmp_path / "m"), calibration(), Method.of({}, "one-shot"))
    assert ranking.orders.keys() == {"d", "f.1", "f.5", "h.0", "h.3", "p.0", "p.3", "q.2", "q.4"}
    for key, order in ranking.orders.items():
        assert (np.diff(np.take_along_axis(ranking.scores[key], order, -1), axis=-1) <= 0).all(), key
    assert (np.diff(ranking.scores["layers"][list(ranking.layers)]) <= 0).all()


# ---- what a ranking is for


@pytest.mark.parametrize("seed", range(3))
def test_a_ranked_checkpoint_is_the_parents_function_in_stock_transformers(tmp_path: Path, seed: int) -> None:
    parent = stock.save(HYBRID, tmp_path / "parent", seed)
    ranking = rank(opened(tmp_path / "parent", None), calibration())
    permute(tmp_path / "parent", ranking, tmp_path / "elastic")
    ids = stock.tokens(29, 3, 12, seed)
    ranked = stock.load(tmp_path / "elastic")
    stock.assert_same(stock.logits(ranked, ids), stock.logits(parent, ids), 1e-5)
    moved = stock.tensors(tmp_path / "parent")["backbone.norm_f.weight"][ranking.orders["d"]]
    assert torch.equal(stock.tensors(tmp_path / "elastic")["backbone.norm_f.weight"], moved)
    again = rank(opened(tmp_path / "elastic", None), calibration())
    assert all((order == np.arange(order.shape[-1])).all() for order in again.orders.values())  # ranked: in order
    assert again.layers == ranking.layers


@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_any_model_ranked_by_any_metrics_is_the_same_function_and_then_in_order(
    fresh: Callable[[], Path], data: st.DataObject, seed: int
) -> None:
    architecture, directory = data.draw(architectures(needs="M*-", kinds="M*-")), fresh()
    chosen = {axis: data.draw(st.sampled_from([*named, "magnitude"])) for axis, named in METRICS.items()}
    method = Method.of(chosen, data.draw(st.sampled_from(METHODS)))
    parent = stock.save(architecture, directory / "parent", seed)
    ids = stock.tokens(architecture.vocab_size, 3, 9, seed)
    batches = [(ids[:2], torch.ones(2, 9).bool()), (ids[2:], torch.arange(9)[None] < 6)]
    ranking = rank(opened(directory / "parent"), batches, method)
    permute(directory / "parent", ranking, directory / "elastic")
    ranked = stock.load(directory / "elastic")
    stock.assert_same(stock.logits(stock.float64(ranked), ids), stock.logits(stock.float64(parent), ids))
    again = rank(opened(directory / "elastic"), batches, method)
    assert again.layers == ranking.layers
    for key, score in ranking.scores.items():
        in_order = score if key == "layers" else np.take_along_axis(score, ranking.orders[key], -1)
        np.testing.assert_allclose(again.scores[key], in_order, rtol=1e-6, atol=1e-12, err_msg=key)


def test_the_model_of_one_layer_has_an_order_too(tmp_path: Path) -> None:
    model = stock.randomize(NemotronH(Architecture("-", vocab_size=29, hidden_size=8, intermediate_size=8)), 0)
    assert rank(model, calibration()).layers == (0,)


def test_without_data_or_with_a_broken_model_there_is_no_ranking(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    model = opened(tmp_path / "m")
    with pytest.raises(NestlingError, match="needs calibration data"):
        rank(model, [])
    model.on_disk()["backbone.layers.1.mixer.up_proj.weight"][4] = float("nan")
    with pytest.raises(NestlingError, match=r"the input of backbone.layers.1.mixer.down_proj is not finite"):
        rank(model, calibration())
    with pytest.raises(NestlingError, match=r"the output of backbone.layers.1.mixer.up_proj is not finite"):
        rank(model, calibration(), Method.of({"ffn": "pre"}))
    unseen = Method.of(dict.fromkeys(AXES, "random"))
    with pytest.raises(NestlingError, match="layer 0: the logits of the model without it are not finite"):
        rank(model, calibration(), unseen)


def test_a_ranking_needs_no_gradients(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    model = opened(tmp_path / "m").requires_grad_(True)
    assert isinstance(rank(model, calibration()), Ranking)
    assert all(parameter.grad is None for parameter in model.parameters())
