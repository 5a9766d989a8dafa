"""Elastic distillation: the teacher stays as it is, the family is nested and on budget, a stopped run goes on."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

pytest.importorskip("reasoning_gym")

import stock
from nestling.arch.cost import parameters
from nestling.arch.search import SearchSpace
from nestling.arch.submodel import WHOLE, Submodel, complete, is_within
from nestling.arch.targets import Target
from nestling.data.batches import Data, Stage, batch, worked
from nestling.errors import NestlingError
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard
from nestling.tasks import Task
from nestling.tokenizer import character_tokenizer
from nestling.train import checkpoints, elastic, teaching
from nestling.train.checkpoints import Metrics, Run
from nestling.train.chunked import distilled
from nestling.train.elastic import Distillation, Trained, distill
from nestling.train.optimize import Trainee
from nestling.train.router import Router

TINY = replace(stock.TINY, hybrid_override_pattern="M*-M-", intermediate_size=48)
SPACE = SearchSpace.of(
    TINY,
    {
        "hidden_size": [8, 10, 12, 14],
        "intermediate_size": [16, 24, 32, 40],
        "mamba_num_heads": [2],
        "mamba_head_dim": [2],
        "num_attention_heads": [1],
        "layers": [4],
    },
)
WHOLE_COUNT = parameters(TINY)
TARGETS = {
    name: Target("parameters", count)
    for name, count in {"100%": WHOLE_COUNT, "75%": WHOLE_COUNT * 3 // 4, "50%": WHOLE_COUNT // 2}.items()
}
SUMS = Task.parse("chain_sum:max_terms=2,max_digits=1")
ROUTED = 4  # steps in which the router learns
HOW = Distillation(
    stages=(Stage(3, 4), Stage(5, 4)),
    learning_rate=0.01,
    warmup=2,
    decay=0.5,
    weight_decay=0.0,
    router_steps=ROUTED,
    router_learning_rate=0.01,
    resource_weight=1.0,
    dead_zone=0.01,
    temperature=(1.0, 0.05),
    logit_scale=(1.0, 10.0),
)
SETTLES = Distillation(
    **{**vars(HOW), "router_steps": 7, "settle_steps": 2, "router_learning_rate": 0.3, "temperature": (1.0, 0.5)}
)
BY_HAND = {"100%": WHOLE, "75%": Submodel(hidden_size=12), "50%": Submodel(hidden_size=8, intermediate_size=32)}


def model(seed: int = 0) -> NemotronH:
    return stock.randomize(NemotronH(TINY), seed)


def run(
    state: Path, student: NemotronH | None = None, teacher: NemotronH | None = None, every: int = 2, **given: Any
) -> Trained:
    student, teacher = student or model(), teacher or model()
    options = {"space": SPACE, "ranked_layers": (3, 0, 4, 1, 2), "how": HOW, "targets": TARGETS, "seed": 5} | given
    data = sums(options["how"], options["seed"])
    return distill(student, teacher, data, run=Run(state, "same", "train elastic", every=every), **options)


def sums(how: Distillation, seed: int) -> Data:
    return worked([SUMS] * len(how.stages), how.stages, character_tokenizer(), seed)


def weights(made: NemotronH) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in made.on_disk().items()}


# ---- the teacher and the student


@pytest.mark.parametrize("family", [None, BY_HAND], ids=["router", "by hand"])
def test_the_teacher_is_frozen_and_reads_every_problem_once(
    tmp_path: Path, family: Mapping[str, Submodel] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = model(), model().train().requires_grad_(True)  # as careless as a caller can be
    before, asked = weights(teacher), []

    def watched(inputs_BL: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        assert not any(part.training for part in teacher.modules())
        assert not torch.is_grad_enabled()
        out = hidden(inputs_BL, *given, **named)
        assert not out.requires_grad
        asked.append(len(inputs_BL))
        return out

    hidden = teacher.hidden
    monkeypatch.setattr(teacher, "hidden", watched)
    trained = run(tmp_path / "s", student, teacher, family=family)
    assert sum(asked) == sum(stage.steps * stage.batch for stage in HOW.stages)
    for name, parameter in teacher.on_disk().items():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
        assert not parameter.requires_grad
    assert trained.model is student
    assert not student.training
    for name, parameter in student.on_disk().items():
        assert not torch.equal(parameter, before[name]), f"{name} was not trained"


def test_each_budget_starts_from_the_divergence_of_its_prefix(tmp_path: Path) -> None:
    """At the first step the whole student is the teacher; the smaller ones are as far off as their prefixes are."""
    data = batch(SUMS, character_tokenizer(), 5, 0, 4)
    with torch.no_grad():
        teacher, *sizes = (
            model()(data.inputs_BL, widths).logits[data.counted_BL].log_softmax(-1)
            for widths in [None, *(hard(TINY, size) for size in BY_HAND.values())]
        )
        wanted = {
            name: F.kl_div(said, teacher, log_target=True, reduction="batchmean").item()
            for name, said in zip(BY_HAND, sizes, strict=True)
        }
    first = run(tmp_path / "s", family=BY_HAND).rows[0]
    assert first["kl"] == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert first["kl"]["100%"] < 1e-6 < 0.01 < first["kl"]["75%"] < first["kl"]["50%"]
    assert first["loss"] == pytest.approx(sum(wanted.values()) / 3, rel=1e-5)
    assert first["tokens"] == data.tokens


def test_distillation_brings_the_small_sizes_closer(tmp_path: Path) -> None:
    how = Distillation(**{**vars(HOW), "stages": (Stage(40, 4),)})
    rows = run(tmp_path / "s", how=how, family=BY_HAND).rows
    for name in ("75%", "50%"):
        assert sum(row["kl"][name] for row in rows[-5:]) < 0.6 * sum(row["kl"][name] for row in rows[:5])


# ---- the router


def routed(state: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> tuple[Trained, list[dict[str, Any]]]:
    """A run, and the router's weights and optimizer state after every step."""
    seen: list[dict[str, Any]] = []
    save = checkpoints.save

    def spy(run: Run, trainee: Trainee, rows: list[Metrics], extra: Mapping[str, Any]) -> None:
        seen.append({name: value.tolist() for name, value in trainee.tensors().items() if "router" in name})
        save(run, trainee, rows, extra)

    monkeypatch.setattr(checkpoints, "save", spy)
    return run(state, every=1, **given), seen


def test_the_router_learns_and_then_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, seen = routed(tmp_path / "s", monkeypatch)
    assert len(seen) == HOW.steps
    names = {name for name in seen[0] if name.startswith("parameter/router.")}
    assert {name.split(".")[2] for name in names} == {field for field, _ in SPACE.candidates}
    for before, after in itertools.pairwise(seen[:ROUTED]):
        assert all(before[name] != after[name] for name in names)
    for before, after in itertools.pairwise(seen[ROUTED - 1 :]):
        assert all(before[name] == after[name] for name in names)
    assert all(("router" in row) == (row["step"] < ROUTED) for row in trained.rows)
    for row in trained.rows[:ROUTED]:
        assert row["router"]["100%"] == {}  # the whole model needs no choice
        assert row["router"]["50%"]["sizes"].keys() == {field for field, _ in SPACE.candidates}
        for field, size in row["router"]["50%"]["sizes"].items():
            assert SPACE[field][0] <= size <= SPACE[field][-1]
    heat = [row["router"]["50%"]["temperature"] for row in trained.rows[:ROUTED]]
    assert heat == pytest.approx([1.0, 1 - 0.95 / 3, 1 - 1.9 / 3, 0.05])


def test_the_resource_loss_alone_leads_each_budget_to_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = Distillation(
        **{**vars(HOW), "stages": (Stage(61, 1),), "router_steps": 60, "temperature": (1.0, 1.0),
           "resource_weight": 10.0, "learning_rate": 1e-9, "router_learning_rate": 0.02}
    )  # fmt: skip
    monkeypatch.setattr(teaching, "distilled", lambda _, student, *rest: 0 * student.sum())
    rows = run(tmp_path / "s", how=how, every=999).rows
    for name in ("75%", "50%"):
        gaps = [abs(row["router"][name]["expected"] - 1) for row in rows[:60]]
        assert sum(gaps[-10:]) < 0.5 * sum(gaps[:10]), name


def test_every_step_and_every_budget_draws_its_own_noise(tmp_path: Path) -> None:
    still = {"router_learning_rate": 1e-9, "temperature": (1.0, 1.0), "logit_scale": (1.0, 1.0)}
    rows = run(tmp_path / "s", how=Distillation(**{**vars(HOW), **still})).rows[:ROUTED]
    for field in ("hidden_size", "intermediate_size"):
        drawn = [row["router"][name]["sizes"][field] for row in rows for name in ("75%", "50%")]
        assert len({round(size, 3) for size in drawn}) == len(drawn)


@pytest.mark.parametrize("settle", [1, 2, 3, 5])
def test_sizes_are_frozen_as_soon_as_the_choice_has_stood_for_long_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settle: int
) -> None:
    chosen: list[Any] = []
    step = trained_step(monkeypatch, lambda made: chosen.append([made.choose(budget) for budget in range(3)]))
    trained = run(tmp_path / "s", how=Distillation(**{**vars(SETTLES), "settle_steps": settle}))
    assert step() == HOW.steps
    same = [all(picks == chosen[at] for picks in chosen[at - settle : at]) for at in range(settle, 8)]
    due = next((settle + at for at, stood in enumerate(same) if stood), 7)
    assert not all(same), "the choice never changes"
    assert [row["step"] for row in trained.rows if "frozen" in row] == [min(due, 7)]
    assert [row["step"] for row in trained.rows if "router" in row] == list(range(min(due, 7)))
    family = {name: submodel.to_json() for name, submodel in trained.family.items()}
    assert trained.rows[min(due, 7)]["frozen"] == family


def trained_step(monkeypatch: pytest.MonkeyPatch, look: Callable[[Router], None]) -> Callable[[], int]:
    """Have the router looked at before every step; returns how many there were."""
    compute, seen = elastic._Elastic.compute, itertools.count()

    def looking(made: Any, step: int) -> Metrics:
        assert step == next(seen)
        look(made.router)
        return compute(made, step)

    monkeypatch.setattr(elastic._Elastic, "compute", looking)
    return lambda: next(seen)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_family_is_nested_on_budget_and_the_largest_is_whole(tmp_path: Path, seed: int) -> None:
    trained = run(tmp_path / "s", seed=seed)
    assert list(trained.family) == ["100%", "75%", "50%"]
    assert trained.family["100%"] == complete(TINY, WHOLE)
    for name, submodel in trained.family.items():
        assert 0.98 * TARGETS[name].value <= parameters(TINY, submodel) <= TARGETS[name].value
        assert 1 in submodel.layers  # the only attention layer
    for larger, smaller in itertools.combinations(trained.family.values(), 2):
        assert is_within(TINY, smaller, larger)


def test_sizes_chosen_by_hand_stay(tmp_path: Path) -> None:
    trained = run(tmp_path / "s", family=BY_HAND)
    assert trained.family == BY_HAND
    assert not any("router" in row for row in trained.rows)


def test_an_impossible_space_is_refused_before_the_first_step(tmp_path: Path) -> None:
    teacher = model()
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    narrow = SearchSpace.of(TINY, {"hidden_size": [15], "intermediate_size": [40]})
    with pytest.raises(NestlingError, match=r"budget 75% wants .* parameters.* add smaller candidates.* hidden_size"):
        run(tmp_path / "s", teacher=teacher, space=narrow)
    assert not (tmp_path / "s").exists()


# ---- stopped and resumed


def result(trained: Trained, state: Path) -> Any:
    with safe_open(max(state.glob("step-*")), framework="pt") as file:
        saved = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118 - not a mapping
        note = json.loads(file.metadata()["nestling"])
    rows = timeless(trained.rows)
    assert timeless(note.pop("rows")) == rows
    return {name: value.tolist() for name, value in weights(trained.model).items()}, rows, trained.family, saved, note


def timeless(rows: list[Metrics]) -> list[Metrics]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    state = tmp_path_factory.mktemp("undisturbed") / "s"
    return result(run(state), state)


def stop_at(step: int, calls: int, stop: Callable[[], Any]) -> Callable[..., Any]:
    """`distilled` that stops the run at its n-th call of a step, when some budgets have left their gradients.

    A step calls it for each part of the batch at each budget.
    """
    seen = itertools.count(1)

    def stopping(*given: Any) -> Any:
        if next(seen) == step * 2 * len(TARGETS) + calls:
            stop()
        return distilled(*given)

    return stopping


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("step", "calls"), [(1, 2), (3, 1), (ROUTED, 1), (ROUTED, 5), (6, 3), (7, 6)])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_never_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any, step: int, calls: int
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(teaching, "distilled", stop_at(step, calls, interrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "s")
    assert any((tmp_path / "s").glob("step-*")) == (step >= 2)
    assert result(run(tmp_path / "s"), tmp_path / "s") == undisturbed


def test_a_run_stopped_twice_before_and_after_its_sizes_are_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any
) -> None:
    for step in (3, 4):  # counted from where it goes on: at steps 3 and 2 + 4
        with monkeypatch.context() as patched:
            patched.setattr(teaching, "distilled", stop_at(step, 1, interrupt))
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "s")
    assert result(run(tmp_path / "s"), tmp_path / "s") == undisturbed


@pytest.mark.parametrize("step", range(1, 7))
def test_how_long_a_choice_has_stood_survives_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    how = Distillation(**{**vars(SETTLES), "settle_steps": 3, "router_learning_rate": 0.05})
    wanted = result(run(tmp_path / "undisturbed", how=how, every=1), tmp_path / "undisturbed")
    assert [row["step"] for row in wanted[1] if "frozen" in row] == [6]
    with monkeypatch.context() as patched:
        patched.setattr(teaching, "distilled", stop_at(step, 1, interrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "s", how=how, every=1)
    assert result(run(tmp_path / "s", how=how, every=1), tmp_path / "s") == wanted


KILLED = """
import os, signal, sys
from pathlib import Path
import test_elastic as here
from nestling.train import teaching
teaching.distilled = here.stop_at(5, 2, lambda: os.kill(os.getpid(), signal.SIGKILL))
here.run(Path(sys.argv[1]))
"""


def test_a_killed_process_goes_on_as_if_nothing_had_happened(tmp_path: Path, undisturbed: Any) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "s")], env=environment, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert any((tmp_path / "s").glob("step-*"))
    assert result(run(tmp_path / "s"), tmp_path / "s") == undisturbed


def test_another_seed_is_another_run(tmp_path: Path, undisturbed: Any) -> None:
    other = run(tmp_path / "s", seed=6)
    assert timeless(other.rows) != undisturbed[1]
