"""What is timed: candidates, as models laid into one storage, decoding after a context. No test depends on times."""

import itertools

import pytest
import torch

import stock
from nestling.arch.cost import parameters
from nestling.arch.presets import PRESETS
from nestling.arch.search import SearchSpace
from nestling.arch.submodel import WHOLE, Submodel, complete, standalone
from nestling.errors import NestlingError
from nestling.infer import timing
from nestling.infer.timing import ALIGNMENT, Timing, candidates, time_submodels
from nestling.model.nemotron_h import NemotronH


def test_candidates_are_the_whole_and_different_members_of_the_space() -> None:
    space = SearchSpace.of(stock.TINY, {"hidden_size": [8, 12], "layers": [2]})
    found = candidates(stock.TINY, space, 12, seed=1)
    assert found[0] == complete(stock.TINY, WHOLE)
    assert len(set(found)) == len(found) > 5
    assert {submodel.hidden_size for submodel in found} == {8, 12, 16}
    assert {len(submodel.layers) for submodel in found} == {2, 3}
    assert all(1 in submodel.layers for submodel in found)  # the attention layer
    assert candidates(stock.TINY, space, 12, seed=1) == found != candidates(stock.TINY, space, 12, seed=2)


def test_without_a_space_every_axis_of_a_model_varies() -> None:
    nano = PRESETS["nemotron-nano-12b-v2"]
    found = candidates(nano, None, 40, seed=0)
    assert len(found) == 40
    for field in nano.elastic_fields:
        assert len({getattr(submodel, field) for submodel in found}) > 3, field
    assert len({len(submodel.layers) for submodel in found}) > 3


@pytest.mark.parametrize("submodel", [WHOLE, Submodel(hidden_size=8, mamba_num_heads=2), Submodel(layers=(0, 1))])
def test_a_timed_model_is_the_slice_with_weights_of_its_own(submodel: Submodel) -> None:
    storage = torch.randn(50_000)
    architecture = standalone(stock.TINY, submodel)
    model = timing.laid_into(storage, architecture)
    assert sum(each.numel() for each in model.parameters()) == parameters(stock.TINY, submodel)
    places = sorted((each.storage_offset(), each.numel()) for each in model.parameters())
    assert all(start % ALIGNMENT == 0 for start, _ in places)
    assert all(a + count <= b for (a, count), (b, _) in itertools.pairwise(places))
    assert {each.untyped_storage().data_ptr() for each in model.parameters()} == {storage.untyped_storage().data_ptr()}
    copied = NemotronH(architecture)
    copied.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    ids = stock.tokens(16, 1, 5)
    stock.assert_same(model(ids).logits, copied(ids).logits, 1e-6)


def test_every_candidate_has_its_turn_in_every_round_and_a_turn_decodes_at_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int, int]] = []
    forward = NemotronH.forward

    def watched(self: NemotronH, ids: torch.Tensor, widths: object, cache: object) -> object:
        seen.append((id(self), ids.shape[1], cache.length))
        return forward(self, ids, widths, cache)

    monkeypatch.setattr(NemotronH, "forward", watched)
    sizes = [complete(stock.TINY, WHOLE), Submodel(hidden_size=8), Submodel(layers=(0, 1))]
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) ** 2 / 1000)  # ever slower
    turns: list[int] = []
    table = time_submodels(stock.TINY, sizes, Timing(batch=2, context=7, rounds=3, steps=2), turns.append)
    assert [submodel for submodel, _ in table.rows] == sizes
    assert turns == list(range(1, 10))
    prompts, steps = seen[:3], seen[3:]
    assert {(length, behind) for _, length, behind in prompts} == {(7, 0)}
    assert [(length, behind) for _, length, behind in steps] == [(1, 7), (1, 8), (1, 9)] * 9  # one to warm up
    order = [model for model, _, behind in steps if behind == 7]
    assert order == [model for model, _, _ in prompts] * 3
    assert list(table.times) == sorted(table.times)
    assert dict(table.how)["context"] == 7
    first = [(2 * n + 1) for n in (2, 4, 20, 22, 38, 40)]  # the ticks of the first candidate's timed steps
    assert table.times[0] == pytest.approx((first[2] + first[3]) / 2)


def test_experts_cannot_be_timed() -> None:
    with pytest.raises(NestlingError, match="experts"):
        time_submodels(PRESETS["star-elastic-12b-a2b"], [WHOLE], Timing(), lambda done: None)


def test_nothing_is_read_of_the_machine_that_it_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(OSError))
    assert "cores" in timing._machine()
