"""Training a parent: a pure function of its settings, resumable bit for bit, from weights of the right scale."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import stock

pytest.importorskip("reasoning_gym")

from nestling.arch.architecture import Architecture
from nestling.data import batches as data
from nestling.data.batches import Stage, batch, worked
from nestling.errors import NestlingError
from nestling.model.nemotron_h import NemotronH
from nestling.tasks import Task
from nestling.tokenizer import character_tokenizer
from nestling.train import pretrain as module
from nestling.train.checkpoints import Metrics, Run
from nestling.train.pretrain import Pretraining, initialize, pretrain

TINY = stock.TINY
SHORT, LONG = Task.parse("chain_sum:max_terms=2,max_digits=1"), Task.parse("chain_sum:max_terms=3,max_digits=1")
HOW = Pretraining((Stage(4, 6), Stage(6, 8)), learning_rate=0.02, warmup=2, decay=0.5, weight_decay=0.1)


def train(state: Path, seed: int = 0, how: Pretraining = HOW) -> tuple[NemotronH, list[Metrics]]:
    data = worked([SHORT, LONG][: len(how.stages)], how.stages, character_tokenizer(), seed)
    return pretrain(TINY, data, how, seed, Run(state, "same", "train parent", every=2))


def result(trained: tuple[NemotronH, list[Metrics]], state: Path) -> Any:
    """Weights, metrics but for wall-clock time, and everything of the last state, which has the optimizer's."""
    model, rows = trained
    with safe_open(max(state.glob("step-*")), framework="pt") as file:
        saved = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118 - not a mapping
        note = json.loads(file.metadata()["nestling"])
    assert timeless(note.pop("rows")) == timeless(rows)
    return {n: p.tolist() for n, p in model.on_disk().items()}, timeless(rows), saved, note


def timeless(rows: list[Metrics]) -> list[Metrics]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    state = tmp_path_factory.mktemp("undisturbed") / "s"
    return result(train(state), state)


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_never_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any, stop: int
) -> None:
    def stopping(task: Task, tokenizer: Any, seed: int, step: int, size: int) -> Any:
        if step == stop:
            raise KeyboardInterrupt
        return batch(task, tokenizer, seed, step, size)

    with monkeypatch.context() as patched:
        patched.setattr(data, "batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "s")
    assert any((tmp_path / "s").glob("step-*")) == (stop > 1)
    assert result(train(tmp_path / "s"), tmp_path / "s") == undisturbed


def test_seed_and_stages_make_the_run(tmp_path: Path, undisturbed: Any) -> None:
    other = timeless(train(tmp_path / "seed", seed=1)[1])
    assert other[0]["loss"] != undisturbed[1][0]["loss"]
    first = [row["tokens"] for row in undisturbed[1]]
    expected = [batch(SHORT, character_tokenizer(), 0, step, 6).tokens for step in range(4)]
    expected += [batch(LONG, character_tokenizer(), 0, step, 8).tokens for step in range(4, 10)]
    assert first == expected


def test_the_loss_starts_at_chance_and_falls(tmp_path: Path) -> None:
    how = Pretraining((Stage(40, 8),), learning_rate=0.02, warmup=2, decay=0.5, weight_decay=0.0)
    model, rows = train(tmp_path / "s", how=how)
    losses = [row["loss"] for row in rows]
    assert losses[0] == pytest.approx(math.log(16), abs=0.3)
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert not model.training


def test_the_loss_is_taken_on_the_solutions_only(tmp_path: Path, undisturbed: Any) -> None:
    data = batch(SHORT, character_tokenizer(), 0, 0, 6)
    model = initialize(NemotronH(TINY), 0)
    with torch.no_grad():
        chances = model(data.inputs_BL).logits.log_softmax(-1)
    picked = [
        -chances[row, place, data.targets_BL[row, place]].item()
        for row in range(6)
        for place in range(data.targets_BL.shape[1])
        if data.counted_BL[row, place]
    ]
    assert undisturbed[1][0]["loss"] == pytest.approx(sum(picked) / len(picked), rel=1e-6)


def test_a_loss_that_is_not_finite_names_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.predicted
    steps = iter(range(99))  # two parts of a batch each
    monkeypatch.setattr(module, "predicted", lambda *a: real(*a) * (float("nan") if next(steps) == 2 * 3 else 1))
    with pytest.raises(NestlingError, match="train parent: the loss is nan at step 3"):
        train(tmp_path / "s")


def test_initial_weights_have_the_scale_their_place_asks_for() -> None:
    wide = Architecture("M*-", vocab_size=16, hidden_size=64, intermediate_size=256, n_groups=2, mamba_num_heads=16,
                        mamba_head_dim=8, num_key_value_heads=2, num_attention_heads=8, head_dim=8)  # fmt: skip
    weights = {name: p.detach() for name, p in initialize(NemotronH(wide), 3).on_disk().items()}
    for name, weight in weights.items():
        assert weight.isfinite().all(), name
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            assert (weight == 1).all()
        elif name.endswith("A_log"):
            torch.testing.assert_close(weight.exp(), torch.arange(1.0, 17))
        elif name.endswith("dt_bias"):
            dt = torch.nn.functional.softplus(weight)
            assert dt.min() >= 0.00099
            assert dt.max() <= 0.1001
        elif name.endswith("conv1d.bias"):
            assert not weight.any()
        elif name.endswith("conv1d.weight"):
            assert 0.3 < weight.abs().max() <= 0.5
        else:
            std = 0.02 if ".layers." not in name else weight.shape[1] ** -0.5
            assert weight.std().item() == pytest.approx(std, rel=0.15), name
    again = initialize(NemotronH(wide), 3).on_disk()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
