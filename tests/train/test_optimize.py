"""Optimizers by group, schedules, and the ways to compute a step: pieces of a batch, checkpointing, bfloat16."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

import stock
from nestling.arch.submodel import Submodel
from nestling.model.cache import Cache
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard
from nestling.train.optimize import Optimization, Schedule, Trainee, model_trainee

HOW = Optimization(learning_rate=0.1, warmup=1, decay=0.5, weight_decay=0.0, precision="bf16")


def test_the_schedule_warms_up_stays_and_falls() -> None:
    shape = [Schedule(10, 3, 0.4).factor(step) for step in range(10)]
    assert shape == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4])
    assert [Schedule(4, 0, 0.0).factor(step) for step in range(4)] == [1, 1, 1, 1]
    assert [Schedule(4, 0, 1.0).factor(step) for step in range(4)] == [1, 3 / 4, 2 / 4, 1 / 4]
    assert [Schedule(2, 8, 0.5).factor(step) for step in range(2)] == [1 / 8, 2 / 8]  # never over the warm-up


def test_the_other_schedules_are_torchs() -> None:
    """The same rates as torch.optim's schedulers chained, which count from 0 where the warm-up here ends at 1."""
    steps, warmup, floor = 30, 5, 0.1
    for shape, after in {
        "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, steps - warmup, eta_min=2.0 * floor),
        "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, floor, steps - warmup),
    }.items():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        scheduler, rates = after(optimizer), []
        for _ in range(steps - warmup):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        ours = [2.0 * Schedule(steps, warmup, 0.4, shape, floor).factor(step) for step in range(steps)]
        assert ours[warmup:] == pytest.approx(rates, rel=1e-9), shape
        assert ours[:warmup] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


@given(
    steps=st.integers(1, 60),
    warmup=st.integers(0, 80),
    decay=st.floats(0, 1),
    shape=st.sampled_from(["wsd", "linear", "cosine"]),
    floor=st.floats(0, 1),
)
def test_any_schedule_rises_then_falls_between_zero_and_one(
    steps: int, warmup: int, decay: float, shape: str, floor: float
) -> None:
    factors = [Schedule(steps, warmup, decay, shape, floor).factor(step) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)


def test_a_step_clips_each_group_and_scales_its_rate() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(4)), "b": nn.Parameter(torch.zeros(2))}
    trainee = Trainee(parameters)
    trainee.add("first", torch.optim.SGD, ["a"], 0.5)
    trainee.add("second", torch.optim.SGD, ["b"], 2.0)
    parameters["a"].grad, parameters["b"].grad = torch.full((4,), 3.0), torch.full((2,), 0.25)
    norm = trainee.clip(2.0)
    trainee.step({"first": 0.1, "second": 0.1})
    assert norm == pytest.approx((4 * 9 + 2 / 16) ** 0.5)  # before clipping
    torch.testing.assert_close(parameters["a"].detach(), torch.full((4,), -0.05))  # clipped from norm 6 to 2
    torch.testing.assert_close(parameters["b"].detach(), torch.full((2,), -0.05))  # not clipped: a norm of its own
    assert parameters["a"].grad is None


def test_muon_gets_the_matrices_inside_blocks_and_adamw_the_rest() -> None:
    shapes = {
        "backbone.embeddings.weight": (5, 4),
        "lm_head.weight": (5, 4),
        "backbone.layers.0.norm.weight": (4,),
        "backbone.layers.0.mixer.in_proj.weight": (6, 4),
        "backbone.layers.0.mixer.conv1d.weight": (6, 1, 4),
        "backbone.layers.1.mixer.down_proj.weight": (4, 8),
    }
    trainee = model_trainee({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}, 0.1, 0.3)
    matrices = ["backbone.layers.0.mixer.in_proj.weight", "backbone.layers.1.mixer.down_proj.weight"]
    assert trainee.names["muon"] == matrices
    assert sorted(trainee.names["muon"] + trainee.names["adamw"]) == sorted(shapes)
    assert [o.param_groups[0]["weight_decay"] for o in trainee.optimizers.values()] == [0.3, 0.0]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_weight_decay_shrinks_the_matrices_inside_blocks_and_nothing_else(optimizer: str) -> None:
    shapes = {"backbone.embeddings.weight": (5, 4), "backbone.layers.0.norm.weight": (4,)}
    shapes["backbone.layers.0.mixer.up_proj.weight"] = (6, 4)
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    trainee = model_trainee(parameters, 0.1, 0.5, optimizer)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    trainee.step(dict.fromkeys(trainee.rates, 1.0))
    left = [parameter.detach().mean().item() for parameter in parameters.values()]
    assert left == pytest.approx([1.0, 1.0, 1 - 0.1 * 0.5])
    assert all(parameter.grad is None for parameter in parameters.values())


def test_adamw_is_torchs_with_its_own_groups() -> None:
    gradients = [stock.tokens(9, 6, 4, seed).float() - 4 for seed in range(3)]
    name = "backbone.layers.0.mixer.up_proj.weight"
    mine, theirs = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6, 4))
    trainee = model_trainee({name: mine, "backbone.norm_f.weight": nn.Parameter(torch.ones(2))}, 0.1, 0.3, "adamw")
    other = torch.optim.AdamW([theirs], lr=0.05, betas=(0.9, 0.95), weight_decay=0.3)
    for gradient in gradients:
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        trainee.step(dict.fromkeys(trainee.rates, 0.5))
        other.step()
    torch.testing.assert_close(mine, theirs)


# ---- ways to compute a step


def gradients(model: NemotronH, widths: Any) -> dict[str, torch.Tensor]:
    ids = stock.tokens(16, 3, 12)
    model(ids[:, :-1], widths).logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).mean().neg().backward()
    found = {name: parameter.grad for name, parameter in model.on_disk().items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("submodel", [Submodel(), Submodel(hidden_size=10, layers=(0, 1))])
def test_activation_checkpointing_changes_no_bit_of_a_gradient(submodel: Submodel) -> None:
    widths, asked = hard(stock.TINY, submodel), []
    plain, again = (stock.randomize(NemotronH(stock.TINY), 0) for _ in range(2))
    again.gradient_checkpointing = True
    again.layers[0].register_forward_pre_hook(lambda *_: asked.append(1))
    wanted, found = gradients(plain, widths), gradients(again, widths)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert len(asked) == 2  # forward, and once more for backward


def test_bfloat16_computes_in_it_but_the_state_space_and_the_gradients_stay_wide() -> None:
    model, widths, seen = stock.randomize(NemotronH(stock.TINY), 0), hard(stock.TINY), {}
    ids = stock.tokens(16, 3, 12)
    with HOW.autocast(ids), torch.no_grad():
        cache = Cache()
        narrow = model(ids, widths, cache, watch=lambda layer, site, value: seen.setdefault(site, value.dtype)).logits
    assert (seen["up"], seen["x"], narrow.dtype) == (torch.bfloat16,) * 3
    assert {state["ssm"].dtype for state in cache.layers.values() if "ssm" in state} == {torch.float32}
    with torch.no_grad():
        exact = model(ids).logits
    assert 0 < (narrow - exact).abs().max() < 0.05 * exact.abs().max()
    with HOW.autocast(ids):
        narrow_gradients = gradients(model, widths)
    exact_gradients = gradients(stock.randomize(NemotronH(stock.TINY), 0), widths)
    for name, gradient in narrow_gradients.items():
        assert gradient.dtype == torch.float32
        off = (gradient - exact_gradients[name]).norm() / exact_gradients[name].norm()
        assert off < 0.1, (name, off)
