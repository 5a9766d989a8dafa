"""The router and its one relaxation: exact at one-hot choices, and against its equation everywhere else."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import stock
from nestling.arch.architecture import Architecture
from nestling.arch.nemotron_h import FIELDS, PER_LAYER
from nestling.arch.search import SearchSpace, pick
from nestling.arch.submodel import least_experts
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard, masked
from nestling.train.router import HIDDEN, Router, annealed, soft
from relaxation import HYBRID, ORDER, SPACE
from strategies import architectures


def random_model(architecture: Architecture, seed: int = 0, dtype: torch.dtype = torch.float64) -> NemotronH:
    return stock.randomize(NemotronH(architecture), seed).to(dtype).requires_grad_(False)


def one_hots(space: SearchSpace, choice: Mapping[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
    return {axis: torch.tensor([size == choice[axis] for size in space[axis]]).to(dtype) for axis in space.axes}


@st.composite
def choices(draw: st.DrawFn) -> tuple[Architecture, SearchSpace, tuple[int, ...], dict[str, int]]:
    """A model, a space over some of its axes, an order of its layers, and one candidate per axis."""
    architecture = draw(architectures(needs="M*-", least=2))
    full, candidates = architecture.sizes(), {}
    for field in draw(st.sets(st.sampled_from(architecture.elastic_fields), min_size=1)):
        *outer, axis = FIELDS[field].split()
        per = full[outer[0]] if outer else 1
        least = least_experts(architecture) if axis == "e" else 1
        candidates[field] = [per * n for n in draw(st.sets(st.integers(least, full[axis]), min_size=1, max_size=4))]
    count = len(architecture.hybrid_override_pattern)
    if draw(st.booleans()):
        candidates["layers"] = sorted(draw(st.sets(st.integers(1, count), min_size=1)))
    per_layer = [field for field in PER_LAYER if field in candidates and draw(st.booleans())]
    space = SearchSpace.of(architecture, candidates, per_layer=per_layer)
    choice = {axis: draw(st.sampled_from(space[axis])) for axis in space.axes}
    return architecture, space, tuple(draw(st.permutations(range(count)))), choice


# ---- at one-hot choices


@given(drawn=choices(), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_a_one_hot_choice_is_the_sub_model(drawn: tuple, seed: int) -> None:
    architecture, space, order, choice = drawn
    submodel = pick(architecture, order, choice)
    ids = stock.tokens(architecture.vocab_size, seed=seed)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):  # float32 rounds: 7e-5 with one channel
        model = random_model(architecture, seed, dtype)
        relaxed = model(ids, soft(architecture, order, space, one_hots(space, choice, dtype))).logits
        stock.assert_same(relaxed, model(ids, hard(architecture, submodel)).logits, tolerance, "soft against hard")
        stock.assert_same(
            relaxed, model(ids, masked(architecture, submodel, dtype)).logits, tolerance, "against masked"
        )


def test_gradients_are_finite_differences() -> None:
    model, ids = random_model(HYBRID), stock.tokens(13, 1, 5)
    weight = torch.randn(1, 5, 13, generator=torch.Generator().manual_seed(0)).double()
    fields = [field for field, _ in SPACE.candidates]
    start = tuple(torch.linspace(-1, 1, len(SPACE[field]), dtype=torch.float64).requires_grad_() for field in fields)

    def pi(logits: Sequence[Tensor]) -> dict[str, Tensor]:
        return {field: values.softmax(0) for field, values in zip(fields, logits, strict=True)}

    def loss(*logits: Tensor) -> Tensor:
        return (model(ids, soft(HYBRID, ORDER, SPACE, pi(logits))).logits * weight).sum()

    assert torch.autograd.gradcheck(loss, start, rtol=1e-5, atol=1e-7)
    for field, gradient in zip(fields, torch.autograd.grad(loss(*start), start), strict=True):
        assert gradient.abs().max() > 1e-4, f"{field} has no say"


# ---- the router itself


def router(budgets: int = 3, seed: int = 0) -> Router:
    return Router(SPACE, budgets, torch.Generator().manual_seed(seed))


def test_the_router_is_one_small_mlp_per_axis() -> None:
    made = router()
    assert {name: tuple(p.shape) for name, p in made.named_parameters() if name.startswith("heads.layers.")} == {
        "heads.layers.0.weight": (HIDDEN, 3),
        "heads.layers.0.bias": (HIDDEN,),
        "heads.layers.2.weight": (3, HIDDEN),
        "heads.layers.2.bias": (3,),
    }
    for budget in range(3):
        found = made(budget, temperature=0.7, scale=5.0)
        for field, sizes in SPACE.candidates:
            w1, b1, w2, b2 = (parameter.detach().double() for parameter in made.heads[field].parameters())
            h = w1[:, budget] + b1
            z = w2 @ torch.where(h > 0, h, 0.01 * h) + b2
            torch.testing.assert_close(found[field].double(), (5.0 * z / 0.7).softmax(0), rtol=1e-5, atol=1e-7)
            assert len(found[field]) == len(sizes)


def test_budgets_have_their_own_probabilities_and_seeds_their_own_router() -> None:
    made = router()
    ours, other = made(0, 1.0, 1.0)["layers"], made(1, 1.0, 1.0)["layers"]
    assert not torch.equal(ours, other)
    assert torch.equal(ours, router()(0, 1.0, 1.0)["layers"])
    assert not torch.equal(ours, router(seed=1)(0, 1.0, 1.0)["layers"])


def test_noise_is_gumbels_and_comes_from_the_generator_alone() -> None:
    made = router()
    with torch.no_grad():
        made.heads["layers"][2].bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    noiseless = made(1, 1.0, 1.0)["layers"]
    generator = torch.Generator().manual_seed(5)
    drawn = torch.stack([made(1, 0.3, 1.0, generator)["layers"] for _ in range(1000)]).detach()
    share = torch.bincount(drawn.argmax(-1), minlength=3) / len(drawn)
    torch.testing.assert_close(share, noiseless.detach(), rtol=0, atol=0.05)  # the Gumbel-max trick, at any temperature
    assert not torch.equal(drawn[0], drawn[1])
    again = torch.Generator().manual_seed(5)
    assert torch.equal(made(1, 0.3, 1.0, again)["layers"], drawn[0])
    draws = made(1, 1.0, 1.0, again)
    assert len({tuple(pi.detach().argsort().tolist()) for pi in draws.values()}) > 1  # every axis its own


def test_a_low_temperature_makes_a_choice_and_choose_takes_the_most_probable() -> None:
    made = router()
    with torch.no_grad():
        for index, (field, _) in enumerate(SPACE.candidates):
            made.heads[field][2].bias[index % len(SPACE[field])] = 3.0
    chosen = made.choose(2)
    assert chosen == {field: sizes[index % len(sizes)] for index, (field, sizes) in enumerate(SPACE.candidates)}
    sharp = made(2, temperature=0.05, scale=10.0)
    assert all(pi.max() > 0.999 for pi in sharp.values())
    assert all(pi.max() < 0.95 for pi in made(2, temperature=1.0, scale=1.0).values())


def test_annealing_is_linear_and_stays_within_its_ends() -> None:
    found = [annealed(1.0, 0.05, at) for at in (-1, 0, 0.5, 1, 2)]
    assert found == pytest.approx([1.0, 1.0, 0.525, 0.05, 0.05])
    assert annealed(1.0, 10.0, 1 / 3) == pytest.approx(4.0)
