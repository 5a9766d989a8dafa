"""A ranking that was stopped and goes on is the one that never was, bit for bit; nothing half-written is left."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import stock
from calibrated import HYBRID, opened
from nestling.errors import NestlingError
from nestling.train.importance import Method, rank
from nestling.train.partial import Partial, accumulate
from nestling.weights import output
from nestling.weights.ranking import Ranking, read_ranking, save_ranking

COUNT = 12


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(29, (2, 5), generator=generator), torch.ones(2, 5).bool()) for _ in range(COUNT)]


class Stopped(list):  # type: ignore[type-arg]
    """Batches of which only so many are given out, over all passes, before Ctrl-C."""

    def __init__(self, left: int) -> None:
        super().__init__(batches())
        self.left = left

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().__iter__():
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


def same(one: Ranking, other: Ranking) -> None:
    assert one.orders.keys() == other.orders.keys()
    for key, order in one.orders.items():
        assert np.array_equal(order, other.orders[key]), key
    for key, score in one.scores.items():
        assert np.array_equal(score, other.scores[key]), key
    assert (one.layers, one.stability) == (other.layers, other.stability)
    assert one.rounds is not None
    assert other.rounds is not None
    assert np.array_equal(one.rounds, other.rounds, equal_nan=True)


@pytest.mark.parametrize("method", ["iterative", "cosine"])
@pytest.mark.parametrize("left", [1, 5, COUNT, COUNT + 7, 3 * COUNT + 2])
def test_stopped_anywhere_and_resumed(tmp_path: Path, left: int, method: str) -> None:
    stock.save(HYBRID, tmp_path / "m")
    model, how = opened(tmp_path / "m", None), Method.of({"ffn": "pre-l2", "hidden": "sum"}, method)
    undisturbed = rank(model, batches(), how)
    state = tmp_path / ".elastic.rank-state"
    passes = 0
    for _ in range(20):  # stopped again and again, after a few batches each time
        stopped, partial = Stopped(left), Partial.resume(state, "these inputs", every=2)
        try:
            found = rank(model, stopped, how, partial)
            break
        except KeyboardInterrupt:
            passes += 1
            left += 3
    same(found, undisturbed)
    assert passes or left > 2 * COUNT
    partial.discard()
    assert not state.exists()


def test_other_inputs_or_a_damaged_file_start_afresh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state"
    begun = Partial(state, "one")
    accumulate("widths", batches(), lambda ids, real: {"sum": ids.double().sum(0)}, begun)
    assert Partial.resume(state, "one").done == {"widths": COUNT}
    assert "going on where it was stopped" in capsys.readouterr().err
    assert Partial.resume(state, "other").done == {}
    assert "options have changed since it was stopped; starting again" in capsys.readouterr().err
    for damaged in (b"", state.read_bytes()[:-3], b"\0" * 400):
        state.write_bytes(damaged)
        assert Partial.resume(state, "one").done == {}
        assert "is damaged" in capsys.readouterr().err


def test_sums_are_kept_apart_by_batch_and_in_constant_memory() -> None:
    partial = Partial()
    sums = accumulate("x", batches(), lambda ids, real: {"sum": ids.double().sum(0), "n": real.sum().double()}, partial)
    ids = torch.stack([ids for ids, _ in batches()]).double()
    assert torch.equal(sums["sum"], torch.stack([ids[0::2].sum((0, 1)), ids[1::2].sum((0, 1))]))
    once = sum(value.numel() for value in sums.values())
    accumulate("y", batches() * 9, lambda ids, real: {"sum": ids.double().sum(0), "n": real.sum().double()}, partial)
    assert sum(value.numel() for value in partial.sums["y"].values()) == once


def test_a_full_disk_is_one_clear_line_and_the_last_good_state_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    accumulate("x", batches(), lambda ids, real: {"n": real.sum().double()}, Partial(state, "one"))
    before = state.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "fsync", full)
    with pytest.raises(NestlingError, match="state: cannot be written: No space left on device"):
        accumulate("x", batches(), lambda ids, real: {"n": real.sum().double()}, Partial(state, "one"))
    assert state.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_saved_ranking_holds_scores_stability_and_rounds(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    made = rank(opened(tmp_path / "m", None), batches(), Method.of({"ffn": "random"}))
    save_ranking(made, tmp_path)
    found = read_ranking(tmp_path)
    assert found is not None
    assert found.layers == made.layers
    assert found.stability.keys() == {"d", "h.0", "h.3", "p.0", "p.3", "q.2", "q.4", "layers"}
    assert found.stability == pytest.approx(made.stability)
    assert made.rounds is not None
    np.testing.assert_allclose(found.rounds, made.rounds, rtol=1e-6)
    assert np.isnan(made.rounds).sum(1).tolist() == [0, 1, 2]
    for key, score in made.scores.items():
        np.testing.assert_allclose(found.scores[key], score, rtol=1e-6)


def test_stability_is_spearmans_correlation_of_the_halves(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    model = opened(tmp_path / "m")
    whole = rank(model, batches(), Method.of({}, "one-shot"))
    even, odd = (rank(model, batches()[half::2], Method.of({}, "one-shot")).scores for half in (0, 1))
    for key in ("d", "f.1", "p.3", "layers"):
        places = [score[key].argsort().argsort() for score in (even, odd)]
        size = len(places[0])
        difference = ((places[0] - places[1]) ** 2).sum()
        assert whole.stability[key] == pytest.approx(1 - 6 * difference / (size * (size**2 - 1))), key
    assert rank(model, batches()[:1]).stability == {}
