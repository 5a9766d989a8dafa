"""Experts, their neurons and those that all tokens share: scores against stock's modules, token by token."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import nestling
import stock
from calibrated import HYBRID, calibration, opened, texts
from nestling.arch.submodel import Submodel
from nestling.train.importance import Method, rank, width_scores
from nestling.train.partial import Partial
from nestling.weights.ranking import Ranking
from nestling.weights.transform import permute

MIXTURE = replace(
    HYBRID,
    hybrid_override_pattern="ME*E",
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=5,
    moe_shared_expert_intermediate_size=7,
    routed_scaling_factor=2.5,
)
EXPERTS = (1, 3)


def mixture(seed: int = 0) -> torch.nn.Module:
    """A random model that sends some tokens to every expert."""
    model = stock.build(MIXTURE, seed)
    for layer in EXPERTS:
        model.model.layers[layer].mixer.gate.e_score_correction_bias *= 0.1
    return model


def method(expert: str, shared: str) -> Method:
    return Method.of({"experts": "reap", "expert_ffn": expert, "shared_ffn": shared}, "cosine")


def watched(model: torch.nn.Module) -> dict[int, dict[str, list[torch.Tensor]]]:
    """Per layer of experts what stock's experts are given, and what its shared expert writes with."""
    seen: dict[int, dict[str, list[torch.Tensor]]] = {layer: {"routed": [], "shared": []} for layer in EXPERTS}
    handles = []
    for layer in EXPERTS:
        mixer, own = model.model.layers[layer].mixer, seen[layer]
        handles += [
            mixer.experts.register_forward_pre_hook(lambda _, given, own=own: own["routed"].append(given)),
            mixer.shared_experts.down_proj.register_forward_pre_hook(
                lambda _, given, own=own: own["shared"].append(given[0].flatten(0, -2))
            ),
        ]
    for row in texts():
        stock.logits(model, row[None])
    for handle in handles:
        handle.remove()
    return seen


def expected(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """By every metric: `reap.LAYER`, `m-post.LAYER`, … from the formulas, one token after the other."""
    found: dict[str, np.ndarray] = {}
    for layer, seen in watched(model).items():
        mixer = model.model.layers[layer].mixer
        added: list[list[float]] = [[] for _ in range(6)]
        absolute, energy = torch.zeros(6, 5).double(), torch.zeros(6, 5).double()
        for given in seen["routed"]:
            for x, chosen, weights in zip(*given, strict=True):
                for expert, weight in zip(chosen.tolist(), weights, strict=True):
                    up, down = mixer.experts.up_proj[expert], mixer.experts.down_proj[expert]
                    hidden = (up @ x).relu().square()
                    added[expert].append(float(weight * (down @ hidden).norm()))
                    absolute[expert] += hidden.abs()
                    energy[expert] += (hidden[None] * down).square().sum(0)
        assert min(map(len, added)) > 0, "an expert that no token takes would prove nothing"
        found[f"e.{layer}"] = np.array([np.mean(each) for each in added])
        found[f"m-post.{layer}"] = absolute.numpy()
        found[f"m-contribution.{layer}"] = (energy / energy.sum(1, keepdim=True)).sqrt().numpy()
        shared, down = torch.cat(seen["shared"]), mixer.shared_experts.down_proj.weight
        energy = (shared[:, None] * down).square().sum((0, 1))
        found[f"s-post.{layer}"] = shared.abs().sum(0).numpy()
        found[f"s-contribution.{layer}"] = (energy / energy.sum()).sqrt().numpy()
    return found


@torch.no_grad()
def test_scores_are_what_stock_experts_do_token_by_token(tmp_path: Path) -> None:
    theirs = mixture()
    theirs.save_pretrained(tmp_path / "m")
    wanted, model = expected(stock.float64(theirs)), opened(tmp_path / "m")
    for name in ("post", "contribution"):
        found, halves = width_scores(model, calibration(), method(name, name), Partial())
        for layer in EXPERTS:
            for key, own in ((f"e.{layer}", "e"), (f"m.{layer}", f"m-{name}"), (f"s.{layer}", f"s-{name}")):
                np.testing.assert_allclose(found[key], wanted[f"{own}.{layer}"], rtol=1e-9, err_msg=f"{key} {name}")
                assert halves[key].shape == (2, *found[key].shape)


@torch.no_grad()
def test_magnitude_is_the_norm_of_everything_stored_for_a_position(tmp_path: Path) -> None:
    stock.save(MIXTURE, tmp_path / "m")
    chosen = {"experts": "magnitude", "expert_ffn": "magnitude", "shared_ffn": "magnitude"}
    found, _ = width_scores(opened(tmp_path / "m"), calibration(), Method.of(chosen, "cosine"), Partial())
    stored = {name: value.double() for name, value in stock.tensors(tmp_path / "m").items()}
    for expert in range(6):
        own = {kind: stored[f"backbone.layers.1.mixer.experts.{expert}.{kind}_proj.weight"] for kind in ("up", "down")}
        gate = stored["backbone.layers.1.mixer.gate.weight"][expert].square().sum()
        bias = stored["backbone.layers.1.mixer.gate.e_score_correction_bias"][expert].square()
        whole = sum(value.square().sum() for value in own.values()) + gate + bias
        assert found["e.1"][expert] ** 2 == pytest.approx(float(whole))
        neurons = own["up"].square().sum(1) + own["down"].square().sum(0)
        np.testing.assert_allclose(found["m.1"][expert] ** 2, neurons, rtol=1e-6)


def planted(directory: Path, seed: int) -> tuple[Ranking, dict[int, tuple[list[int], list[int]]]]:
    """A model in which some experts write nothing, and in every expert one neuron is loud and one dead."""
    model, truth = mixture(seed), {}
    random = np.random.default_rng(seed)
    for layer in EXPERTS:
        mixer, order = model.model.layers[layer].mixer, random.permutation(6).tolist()
        loud, dead = [[int(each) for each in random.permutation(5)[:2]] for _ in range(6)], order[:2]
        mixer.experts.down_proj.data[dead] *= 1e-4
        for expert, (most, least) in enumerate(loud):
            mixer.experts.up_proj.data[expert][most] *= 30
            mixer.experts.down_proj.data[expert][:, least] = 0
        truth[layer] = dead, [each for pair in loud for each in pair]
    model.save_pretrained(directory)
    return rank(opened(directory, None), calibration(), Method(depth="cosine")), truth


@pytest.mark.parametrize("seed", range(3))
def test_what_was_planted_is_found_and_cut_away_last(tmp_path: Path, seed: int) -> None:
    ranking, truth = planted(tmp_path / "parent", seed)
    for layer, (dead, neurons) in truth.items():
        assert set(ranking.orders[f"e.{layer}"][-2:].tolist()) == set(dead)
        for expert, order in enumerate(ranking.orders[f"m.{layer}"]):
            scores = ranking.scores[f"m.{layer}"][expert]
            if (scores > 0).sum() > 1:  # an expert whose other neurons never fire says nothing of them
                assert scores[neurons[2 * expert + 1]] == 0
                assert order[0] == neurons[2 * expert] or scores[neurons[2 * expert]] == 0
    permute(tmp_path / "parent", ranking, tmp_path / "ranked")
    ids = stock.tokens(29)
    parent, ranked = (stock.float64(stock.load(tmp_path / name)) for name in ("parent", "ranked"))
    stock.assert_same(stock.logits(ranked, ids), stock.logits(parent, ids))
    submodel = Submodel(n_routed_experts=4, moe_intermediate_size=3)
    nestling.slice(tmp_path / "ranked", submodel, tmp_path / "cut")
    by_hand = stock.prune(parent, stock.picks(MIXTURE, submodel, ranking.orders))
    stock.assert_same(stock.logits(stock.float64(stock.load(tmp_path / "cut")), ids), stock.logits(by_hand, ids))
