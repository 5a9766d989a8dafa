"""Several processes that shard a model train it as one process does, to rounding."""

from pathlib import Path
from typing import Any

import pytest
import sharded_runs
import torch
from safetensors.torch import load_file

import two_processes
from nestling.errors import NestlingError

APART = ["apart", "apart-soft"]
NAMES = [*(name for name in sharded_runs.RUNS if name not in ("stopped", *APART)), "parent"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of every training."""
    directory = tmp_path_factory.mktemp("two")
    two_processes.start([sharded_runs.__file__, str(directory), *NAMES, *APART, "stopped:6"])
    return directory


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one_does(name: str, two: Path, tmp_path: Path) -> None:
    found = torch.load(two / f"{name}.pt")
    wanted = sharded_runs.train_parent(tmp_path) if name == "parent" else sharded_runs.train(name, tmp_path)
    assert len(wanted["losses"]) >= 20
    assert wanted["losses"][0, -1] > 0.01
    assert (wanted["norms"] > sharded_runs.HOW.clip).any()
    exact = wanted["weights"]["backbone.norm_f.weight"].dtype == torch.float64
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=0, atol=1e-9 if exact else 1e-5)
    assert found.get("family") == wanted.get("family")
    for weight, value in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][weight], value, rtol=0, atol=1e-9 if exact else 1e-3)


def test_each_process_may_train_a_budget_of_its_own(two: Path) -> None:
    found, wanted = torch.load(two / "apart.pt"), sharded_runs.first_step_apart(2)
    kl = [wanted["kl"].get(name, 0.0) for name in sharded_runs.SHARES]
    assert found["losses"][0].tolist() == pytest.approx([*kl, wanted["loss"]], abs=1e-9)
    assert found["norms"][0].item() == pytest.approx(wanted["norm"], rel=1e-9)
    drawn = (found["losses"][:, :2] > 0).sum(1)
    assert {*drawn.tolist()} == {1, 2}  # alike in some steps, in others not
    soft = torch.load(two / "apart-soft.pt")
    assert {*(soft["losses"][:20, :2] > 0).sum(1).tolist()} == {1}  # one for all while the router learns
    assert soft["losses"].isfinite().all()
    assert soft["family"]["50%"] != soft["family"]["100%"]


def test_what_two_processes_began_one_goes_on_with_and_three_finish(two: Path) -> None:
    assert checkpoints(two) == [("00000006", True), ("00000007", True)]
    with pytest.raises(KeyboardInterrupt):
        sharded_runs.train("stopped", two / "stopped.state", 13)
    assert checkpoints(two) == [("00000012", False), ("00000014", False)]
    two_processes.start([sharded_runs.__file__, str(two), "stopped"], 3)
    found, wanted = torch.load(two / "stopped.pt"), torch.load(two / "soft.pt")
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=0, atol=1e-9)
    torch.testing.assert_close(found["norms"], wanted["norms"], rtol=1e-9, atol=0)
    for weight, value in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][weight], value, rtol=0, atol=1e-9)


def test_a_mixture_of_experts_goes_on_where_it_was_stopped(two: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sharded_runs.train("experts-soft", tmp_path, 9)
    found, wanted = sharded_runs.train("experts-soft", tmp_path), torch.load(two / "experts-soft.pt")
    assert found["family"] == wanted["family"]
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=0, atol=1e-9)
    for weight, value in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][weight], value, rtol=0, atol=1e-9)


def checkpoints(directory: Path) -> list[tuple[str, bool]]:
    """(step, whether several processes wrote it) of every checkpoint."""
    found = sorted((directory / "stopped.state").glob("step-*"))
    return [(path.name.split("-")[1], path.is_dir()) for path in found]


def test_whole_weights_are_kept_or_gathered_again(two: Path) -> None:
    blocks = len(sharded_runs.MODEL.hybrid_override_pattern)
    again, kept, teacher = torch.load(two / "gatherings")
    assert (again, kept) == (2 * blocks + 1, blocks + 1)  # embeddings, head and last norm are gathered once
    assert teacher == blocks  # its ends stay whole, its blocks never do


def test_an_export_never_has_the_whole_model_on_one_rank(two: Path) -> None:
    made = [torch.load(two / f"{rank}.export") for rank in range(2)]
    weights = made[0]["weights"]
    largest, whole = (of(value.nbytes for value in weights.values()) for of in (max, sum))
    assert sum(each["shards"] for each in made) == whole > 30 * largest
    assert all(largest <= each["peak"] <= 2 * largest for each in made)
    assert [*(two / "export1").iterdir()] == []
    written = load_file(two / "export0" / "model.safetensors")
    assert written.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(written[name], value.bfloat16())


def test_a_batch_is_shared_out_whole() -> None:
    """Every row that counts is in a part of one rank, ranks have as many parts, and shares sum to 1."""
    data = sharded_runs.batch(0, 3)
    for ranks in (1, 2, 3):
        parts = [data.parts(2, rank, ranks) for rank in range(ranks)]
        shares = [share for own in parts for _, share in own]
        assert sum(shares) == pytest.approx(1)
        rows = sorted(tuple(row) for own in parts for part, share in own for row in counted(part) if share)
        assert rows == sorted(tuple(row) for row in counted(data))
        assert len({len(own) for own in parts}) == 1


def counted(data: Any) -> list[list[int]]:
    """The targets that count of every row in which one does."""
    rows = zip(data.targets_BL, data.counted_BL, strict=True)
    return [targets[which].tolist() for targets, which in rows if which.any()]


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(NestlingError, match="a batch of 6 rows cannot be shared out to 4 processes"):
        sharded_runs.batch(0, 0).parts(2, 0, 4)
