"""Scalars beside metrics.jsonl: read back by TensorBoard's own reader; asked for without it, one clear line."""

import json
from pathlib import Path
from typing import Any

import pytest
import test_loop as whole

from nestling.errors import NestlingError
from nestling.train import tensorboard
from nestling.train.checkpoints import METRICS
from nestling.train.tensorboard import scalars

ROW = {"step": 3, "loss": 1.5, "kl": {"100%": 1, "50%": 2.0}, "router": {"50%": {"sizes": {"hidden_size": 12.5}}}}


def test_every_number_of_a_row_has_a_tag() -> None:
    assert dict(scalars(ROW | {"note": "text"})) == {
        "loss": 1.5, "kl/100%": 1, "kl/50%": 2.0, "router/50%/sizes/hidden_size": 12.5
    }  # fmt: skip


def test_asked_for_without_the_package_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    toy = whole.Toy()
    with pytest.raises(NestlingError, match=r"needs tensorboard: pip install 'nestling\[tensorboard\]'"):
        toy.train(tmp_path / "s", tensorboard=tmp_path / "board")
    assert not (tmp_path / "board").exists()
    whole.Toy().train(tmp_path / "other")  # who does not ask does not need it


def read(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_what_tensorboard_reads_is_what_the_metrics_say_also_after_a_stop(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    toy, board = whole.Toy(every=3), tmp_path / "board"
    toy.before = whole.interrupt_at(7)
    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path / "s", tensorboard=board)
    rows = whole.Toy(every=3).train(tmp_path / "s", tensorboard=board)
    found = read(board)
    assert found.keys() == dict(scalars(rows[0])).keys()
    for tag, points in found.items():
        assert [step for step, _ in points] == list(range(whole.STEPS))
        wanted: list[Any] = [dict(scalars(row))[tag] for row in rows]
        assert [value for _, value in points] == pytest.approx(wanted, rel=1e-6)
    assert [json.loads(line) for line in (tmp_path / "s" / METRICS).read_text().splitlines()] == rows
