"""The expected cost of a router's choice, in every unit: exact at one choice, the mean over all of them elsewhere."""

import itertools
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_router import one_hots
from torch import Tensor

from nestling.arch.architecture import Architecture
from nestling.arch.cost import parameters
from nestling.arch.nemotron_h import FIELDS, PER_LAYER
from nestling.arch.search import SearchSpace, pick
from nestling.arch.submodel import WHOLE, least_experts
from nestling.arch.targets import Target
from nestling.train.expected import block_costs, expected_cost
from relaxation import HYBRID, ORDER, SPACE, random_pi
from strategies import architectures

TARGETS = (
    Target("parameters", 1),
    Target("active parameters", 1),
    Target("bytes", 1),
    Target("bytes", 1, 70, "fp8"),
    Target("bytes", 1, 9, "int4"),
)


@st.composite
def choices(draw: st.DrawFn) -> tuple[Architecture, SearchSpace, tuple[int, ...], dict[str, int]]:
    """A model, a space over some of its axes, an order of its layers, and one candidate per axis."""
    architecture = draw(architectures(kinds="M*-E", least=2))
    full, candidates = architecture.sizes(), {}
    for field in draw(st.sets(st.sampled_from(architecture.elastic_fields), min_size=1)):
        *outer, axis = FIELDS[field].split()
        per = full[outer[0]] if outer else 1
        least = least_experts(architecture) if axis == "e" else 1
        counts = draw(st.sets(st.integers(least, full[axis]), min_size=1, max_size=3))
        candidates[field] = [per * count for count in counts]
    layers = len(architecture.hybrid_override_pattern)
    if draw(st.booleans()):
        candidates["layers"] = sorted(draw(st.sets(st.integers(1, layers), min_size=1)))
    per_layer = [field for field in PER_LAYER if field in candidates and draw(st.booleans())]
    space = SearchSpace.of(architecture, candidates, per_layer=per_layer)
    choice = {axis: draw(st.sampled_from(space[axis])) for axis in space.axes}
    return architecture, space, tuple(draw(st.permutations(range(layers)))), choice


def expected(
    architecture: Architecture, order: Sequence[int], space: SearchSpace, target: Target, pi: Mapping[str, Tensor]
) -> Tensor:
    return expected_cost(architecture, order, space, block_costs(architecture, space, target), pi)


@given(drawn=choices(), target=st.sampled_from(TARGETS))
def test_a_one_hot_choice_costs_what_the_sub_model_does(drawn: tuple, target: Target) -> None:
    architecture, space, order, choice = drawn
    found = expected(architecture, order, space, target, one_hots(space, choice, torch.float64))
    assert found.item() == target.measure(architecture, pick(architecture, order, choice))


@pytest.mark.parametrize("target", TARGETS[2:], ids=lambda target: target.precision)
def test_elsewhere_it_is_the_mean_over_every_choice(target: Target) -> None:
    space = SearchSpace.of(HYBRID, {field: sizes[::2] for field, sizes in SPACE.to_json().items()})
    pi, mean, mass = random_pi(space, 3), 0.0, 0.0
    for picked in itertools.product(*(range(len(sizes)) for _, sizes in space.candidates)):
        at = dict(zip(pi, picked, strict=True))
        chance = math.prod(pi[field][i].item() for field, i in at.items())
        choice = {field: space[field][i] for field, i in at.items()}
        mean, mass = mean + chance * target.measure(HYBRID, pick(HYBRID, ORDER, choice)), mass + chance
    assert mass == pytest.approx(1)
    assert expected(HYBRID, ORDER, space, target, pi).item() == pytest.approx(mean, rel=1e-12)


def covered(pi: Tensor, sizes: Sequence[int], whole: int) -> list[float]:
    """Σ_c π_c · [position < c], one position after the other."""
    return [float(sum(p for p, size in zip(pi, sizes, strict=True) if i < size)) for i in range(whole)]


def count_by_hand(d: float, f: float, heads: float, p: float, q: float, gates: Mapping[int, float]) -> float:
    """The parameters of HYBRID at any sizes, from the shapes of its matrices."""
    mamba = d + (2 * heads * p + 12 + heads) * d + 5 * (heads * p + 12) + 3 * heads + heads * p + d * heads * p
    attention = d + 4 * (q + 2 * 2) * d + d * 4 * q
    mlp = d + 2 * f * d
    kinds = {0: mamba, 1: mlp, 2: attention, 3: mlp, 4: mamba}
    return 2 * 13 * d + d + sum(gates[layer] * count for layer, count in kinds.items())


@pytest.mark.parametrize("seed", range(5))
def test_expected_parameters_are_the_count_at_the_expected_sizes(seed: int) -> None:
    pi = random_pi(SPACE, seed)
    mean = {field: float(weight @ torch.tensor(SPACE[field]).double()) for field, weight in pi.items()}
    gates = dict(zip(ORDER, covered(pi["layers"], SPACE["layers"], 5), strict=True))
    fields = ("hidden_size", "intermediate_size", "mamba_num_heads", "mamba_head_dim", "num_attention_heads")
    wanted = count_by_hand(*(mean[field] for field in fields), gates)
    assert expected(HYBRID, ORDER, SPACE, TARGETS[0], pi).item() == pytest.approx(wanted, rel=1e-12)
    assert count_by_hand(12, 20, 6, 4, 6, dict.fromkeys(ORDER, 1)) == parameters(HYBRID)


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_are_finite_differences(target: Target) -> None:
    costs, whole = block_costs(HYBRID, SPACE, target), target.measure(HYBRID, WHOLE)
    fields = [field for field, _ in SPACE.candidates]
    start = tuple(torch.linspace(-1, 1, len(SPACE[field]), dtype=torch.float64).requires_grad_() for field in fields)

    def share(*logits: Tensor) -> Tensor:
        pi = {field: values.softmax(0) for field, values in zip(fields, logits, strict=True)}
        return expected_cost(HYBRID, ORDER, SPACE, costs, pi) / whole

    assert torch.autograd.gradcheck(share, start, rtol=1e-5, atol=1e-7)
    for field, gradient in zip(fields, torch.autograd.grad(share(*start), start), strict=True):
        assert gradient.abs().max() > 1e-4, f"{field} has no say"
