"""The latency table: it finds the costs that made its rows, never makes a smaller model slower, and is one model's."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_targets import HYBRID, MIXTURE, SPACES

import stock
from nestling.arch.architecture import Architecture
from nestling.arch.between import between
from nestling.arch.latency import KINDS, Latencies, _non_negative_least_squares
from nestling.arch.nesting import read_out
from nestling.arch.search import SearchSpace, layer_order
from nestling.arch.submodel import WHOLE, Submodel, is_within, layer_sizes, standalone
from nestling.arch.targets import Target, parse_target, parse_wish
from nestling.errors import NestlingError
from strategies import submodels


def milliseconds(submodel: Submodel) -> float:
    """A machine as one imagines it: so much a layer, and so much a weight of the model stock builds."""
    layers = {"M": 0.03, "*": 0.05, "-": 0.01}
    return (
        0.2
        + sum(layers[kind] for _, kind, _ in layer_sizes(HYBRID, submodel))
        + 2e-6 * stock.numel(stock.on_meta(standalone(HYBRID, submodel)))
    )


def table(count: int = 40, noise: float = 0.0) -> Latencies:
    draw, space = np.random.default_rng(0), SearchSpace.of(HYBRID, SPACES[HYBRID])
    rows = []
    for _ in range(count):
        order = layer_order(HYBRID, draw.permutation(8).tolist())
        sizes = {field: int(draw.choice(sizes)) for field, sizes in space.candidates}
        submodel = Submodel(tuple(sorted(order[: sizes.pop("layers")])), **sizes)
        rows.append((submodel, milliseconds(submodel) * float(np.exp(noise * draw.standard_normal()))))
    return Latencies(HYBRID, tuple(rows), (("machine", "imagined"),))


TABLE = table()


@given(st.data())
@settings(max_examples=25)
def test_it_is_the_machine_that_made_its_rows(data: st.DataObject) -> None:
    fields = ("hidden_size", "intermediate_size", "num_attention_heads", "mamba_num_heads")
    submodel = data.draw(submodels(HYBRID, fields=fields, layers=True))
    assert TABLE.measure(submodel) == pytest.approx(milliseconds(submodel), rel=0.02)


def test_noise_is_averaged_and_the_held_out_error_says_how_much_there_is() -> None:
    noisy = table(80, noise=0.05)
    assert noisy.measure(WHOLE) == pytest.approx(milliseconds(WHOLE), rel=0.06)
    typical, worst = noisy.held_out()
    assert 0.01 < typical < 0.08 < worst < 0.3
    assert TABLE.held_out()[1] < 0.02


@given(st.data(), st.integers(0, 5))
@settings(max_examples=25)
def test_a_smaller_model_is_never_slower(data: st.DataObject, seed: int) -> None:
    random = np.random.default_rng(seed)  # rows that make no sense
    wild = Latencies(HYBRID, tuple((submodel, float(random.uniform(1, 9))) for submodel, _ in TABLE.rows), ())
    submodel = data.draw(submodels(HYBRID, layers=True))
    assert is_within(HYBRID, submodel, WHOLE)
    assert wild.measure(submodel) <= wild.measure(WHOLE)
    assert all((costs >= 0).all() for costs in wild.costs.values())
    assert wild.costs.keys() == set(KINDS)


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_the_fit_is_optimal_by_its_gradient(seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix, wanted = random.normal(size=(20, 4)), random.normal(size=20)
    found = _non_negative_least_squares(matrix, wanted)
    gradient = matrix.T @ (matrix @ found - wanted)
    assert (found >= 0).all()
    assert abs(gradient[found > 0]).max(initial=0) < 1e-8
    assert gradient[found == 0].min(initial=0) > -1e-8


def test_latency_budgets_are_met_and_nested() -> None:
    whole = TABLE.measure(WHOLE)
    names = [f"{share * whole:.3f}ms" for share in (0.9, 0.75, 0.66)]
    targets = {name: parse_target(name, HYBRID, TABLE) for name in names}
    space = SearchSpace.of(HYBRID, SPACES[HYBRID])
    picks = {name: {field: sizes[0] for field, sizes in space.candidates} for name in names}
    family = read_out(HYBRID, layer_order(HYBRID, range(8)), space, targets, picks)
    family["between"] = between(HYBRID, range(8), {}, "x", Target("latency", 0.8 * whole, table=TABLE))
    for submodel, share in zip(family.values(), (0.9, 0.75, 0.66, 0.8), strict=True):
        assert 0.979 * share * whole <= milliseconds(submodel) <= 1.003 * share * whole  # by the imagined machine
    with pytest.raises(NestlingError, match=r"wants 0\.0.* ms a token.* its members have .* ms a token.*add smaller"):
        read_out(HYBRID, range(8), space, {"x": parse_target("0.1ms", HYBRID, TABLE)}, {"x": picks[names[0]]})


def test_a_table_is_written_and_read() -> None:
    again = Latencies.from_json(json.loads(json.dumps(TABLE.to_json())))
    assert again == TABLE
    assert parse_wish("0.3 ms", HYBRID, again) == Target("latency", 0.3, table=TABLE)
    assert Target("latency", 0.3, table=TABLE).to_json() == {"of": "latency", "value": 0.3}


def test_wishes_that_the_table_cannot_answer() -> None:
    with pytest.raises(NestlingError, match=r"'20ms' needs a table of latencies .* nestling bench --latency"):
        parse_wish("20ms", HYBRID)
    with pytest.raises(NestlingError, match=r"of another model: hybrid_override_pattern is 'M-M\*-M-\*' there"):
        parse_wish("20ms", MIXTURE, TABLE)
    with pytest.raises(
        NestlingError, match=r"asks for 20.000 ms a token; the whole model, which is always trained, has"
    ):
        parse_target("20ms", HYBRID, TABLE)
    with pytest.raises(NestlingError, match="mixes two units"):
        parse_wish("20ms@4k", HYBRID, TABLE)
    mixture = Latencies(MIXTURE, ((WHOLE, 1.0),), ())
    with pytest.raises(NestlingError, match="blocks of kind 'E' cannot be timed yet"):
        parse_target("0.5ms", MIXTURE, mixture)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        [],
        {**TABLE.to_json(), "rows": []},
        {**TABLE.to_json(), "rows": [{"submodel": {}, "milliseconds": 0}]},
        {**TABLE.to_json(), "rows": [{"submodel": {"hidden": 4}, "milliseconds": 1}]},
        {**TABLE.to_json(), "rows": [{"submodel": {}}]},
        {**TABLE.to_json(), "architecture": {"model_type": "llama"}},
    ],
)
def test_what_is_no_table_is_refused(spec: object) -> None:
    with pytest.raises(NestlingError, match="latency table"):
        Latencies.from_json(spec)


def test_another_size_of_the_same_pattern_is_another_model() -> None:
    wider = Architecture(**{**vars(HYBRID), "hidden_size": 256})
    with pytest.raises(NestlingError, match="hidden_size is 128 there and 256 here"):
        parse_wish("20ms", wider, TABLE)
