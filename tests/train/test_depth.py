"""Layer rankings equal a brute force that deletes layers from stock models, at the cost that was announced."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import nestling
import stock
from calibrated import HYBRID, calibration, opened, texts
from nestling.arch.submodel import Submodel
from nestling.errors import NestlingError
from nestling.model.nemotron_h import NemotronH
from nestling.train import depth
from nestling.train.depth import cosine_layers, head_gram, leave_one_out, planned, rank_layers, recomputed
from nestling.train.importance import Method, rank
from nestling.train.metrics import AXES
from nestling.train.partial import Partial


def without(model: torch.nn.Module, gone: set[int]) -> list[Tensor]:
    """Logits of a stock model with layers deleted, per text."""
    kept = tuple(layer for layer in range(6) if layer not in gone)
    pruned = stock.prune(model, stock.picks(HYBRID, Submodel(layers=kept)))
    return [stock.logits(pruned, row[None]) for row in texts()]


def brute_force(model: torch.nn.Module, rounds: int) -> tuple[list[dict[int, float]], list[int]]:
    """Delete each layer in turn, then the least important for good, and again: (errors per round, what was deleted)."""
    full = without(model, set())
    scale = sum(float(logits.square().sum()) for logits in full)
    errors: list[dict[int, float]] = []
    gone: list[int] = []
    for _ in range(rounds):
        errors.append({})
        for layer in set(range(6)) - set(gone):
            left = zip(without(model, {*gone, layer}), full, strict=True)
            errors[-1][layer] = sum(float((a - b).square().sum()) for a, b in left) / scale
        gone.append(min(errors[-1], key=lambda layer: errors[-1][layer]))
    return errors, gone


@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_iterative_ranking_is_deleting_layers_from_the_stock_model(
    tmp_path: Path, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stock.float64(stock.save(HYBRID, tmp_path / "m"))
    errors, gone = brute_force(model, rounds)
    monkeypatch.setattr(depth, "ROWS", 5)  # the head, and the tokens, in several pieces
    with torch.no_grad():
        found = rank_layers(opened(tmp_path / "m"), calibration(), rounds, Partial())
    for index, wanted in enumerate(errors):
        np.testing.assert_allclose(
            found.rounds[index], [wanted.get(layer, np.nan) for layer in range(6)], rtol=1e-8, err_msg=str(index)
        )
    left = sorted(set(range(6)) - set(gone), key=lambda layer: -errors[-1][layer])
    assert list(found.layers) == left + gone[::-1]
    assert found.scores[gone[0]] == found.rounds[0][gone[0]]


def test_iterative_sees_that_one_of_two_alike_is_enough() -> None:
    """Layers 0 and 1 write the same v, layer 2 writes w with |v| < |w| < √3 |v|: after 0, layer 2 must go before 1."""
    model = stock.randomize(NemotronH(replace(HYBRID, hybrid_override_pattern="---")), 0).double()
    w = {name: parameter.data for name, parameter in model.on_disk().items()}
    w["lm_head.weight"].copy_(torch.eye(29, 16))
    w["backbone.norm_f.weight"].fill_(1)
    for layer, (channel, size) in enumerate([(0, 1.0), (0, 1.001), (1, 1.4)]):
        w[f"backbone.layers.{layer}.mixer.down_proj.weight"].zero_()
        w[f"backbone.layers.{layer}.mixer.down_proj.bias"].copy_(1e-4 * size * torch.eye(16)[channel])
    with torch.no_grad():
        assert rank_layers(model, calibration(), 1, Partial()).layers == (2, 1, 0)
        assert rank_layers(model, calibration(), 2, Partial()).layers == (1, 2, 0)


def test_the_work_is_what_was_planned_and_nearly_half_of_recomputing(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    model, computed = opened(tmp_path / "m"), []
    handles = [layer.register_forward_hook(lambda *_: computed.append(1)) for layer in model.layers]
    with torch.no_grad():
        for rounds in (1, 4):
            computed.clear()
            rank_layers(model, calibration(), rounds, Partial())
            assert len(computed) == len(calibration()) * planned(6, rounds)
    for handle in handles:
        handle.remove()
    assert planned(62, 1) == 62 + sum(61 - place for place in range(62)) + 61  # whole model, branches, walk
    assert 0.5 < planned(62, 61) / recomputed(62, 61) < 0.55


def test_the_estimate_is_printed_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock.save(HYBRID, tmp_path / "m")

    class Stops(list):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        rank_layers(opened(tmp_path / "m"), Stops(calibration()), 3, Partial())
    assert f"{3 * planned(6, 3):,} layer passes in all" in capsys.readouterr().err


def test_the_head_is_its_gram_matrix_also_when_tied(tmp_path: Path) -> None:
    for untied in (True, False):
        model = stock.randomize(NemotronH(replace(HYBRID, untied=untied)), 0).double()
        (ids, real), *_ = calibration()
        with torch.no_grad():
            full = model(ids).logits[real.bool()]
            found = leave_one_out(model, ids, real, head_gram(model), [])
        np.testing.assert_allclose(found["scale"], full.square().sum(), rtol=1e-10)


def test_bfloat16_models_are_measured_in_more_than_bfloat16(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    narrow = opened(tmp_path / "m", torch.bfloat16)
    exact = nestling.load(tmp_path / "m").model.to(torch.bfloat16).double()  # the same numbers, computed exactly
    for method in ("one-shot", "cosine"):
        one, other = (rank(m, calibration(), Method.of({}, method)) for m in (narrow, exact))
        for key, score in other.scores.items():
            np.testing.assert_allclose(one.scores[key], score, rtol=0.05, atol=0.01 * score.max(), err_msg=key)


def test_cosine_is_of_the_residual_stream_before_and_after(tmp_path: Path) -> None:
    model = stock.float64(stock.save(HYBRID, tmp_path / "m"))
    before: list[Tensor] = []
    for module in [*model.model.layers, model.model.norm_f]:
        module.register_forward_pre_hook(lambda module, args: before.append(args[0][0]))
    total, tokens = np.zeros(6), 0
    for row in texts():
        before.clear()
        stock.logits(model, row[None])
        for layer, (x, y) in enumerate(zip(before, before[1:], strict=False)):
            x, y = x.numpy(), y.numpy()
            total[layer] += ((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).sum()
        tokens += row.numel()
    with torch.no_grad():
        found = cosine_layers(opened(tmp_path / "m"), calibration(), Partial())
    np.testing.assert_allclose(found.scores, 1 - total / tokens, rtol=1e-9)
    assert list(found.layers) == np.argsort(total / tokens).tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", depth.METHODS)
def test_planted_layers_are_found(tmp_path: Path, method: str, seed: int) -> None:
    out = {"M": "out_proj", "*": "o_proj", "-": "down_proj"}
    model = stock.build(HYBRID, seed)
    named = {name.replace("model.", "", 1): parameter.data for name, parameter in model.named_parameters()}
    dead, loud, *_ = np.random.default_rng(seed).permutation(6).tolist()
    for layer in range(6):
        factor = {dead: 0, loud: 3}.get(layer, 0.02)
        projection = f"layers.{layer}.mixer.{out[HYBRID.hybrid_override_pattern[layer]]}"
        for name in (f"{projection}.weight", f"{projection}.bias"):
            if name in named:
                named[name] *= factor
    model.save_pretrained(tmp_path)
    ranking = rank(opened(tmp_path, None), calibration(), Method.of(dict.fromkeys(AXES, "random"), method))
    assert (ranking.layers[0], ranking.layers[-1]) == (loud, dead)
    assert abs(ranking.scores["layers"][dead]) < 1e-6


def test_only_the_iterative_form_is_bounded_and_by_the_layers_there_are() -> None:
    assert [Method.of({}, "iterative", drop).rounds(7) for drop in (None, 1, 6)] == [3, 1, 6]
    assert Method.of({}, "one-shot").rounds(7) == Method.of({}, "cosine").rounds(7) == 1
    for drop in (0, 7):
        with pytest.raises(NestlingError, match=f"max_drop = {drop} is outside 1 … 6 for a model of 7 layers"):
            Method.of({}, "iterative", drop).rounds(7)
    with pytest.raises(NestlingError, match="max_drop bounds the iterative depth ranking"):
        Method.of({}, "one-shot", 2)
