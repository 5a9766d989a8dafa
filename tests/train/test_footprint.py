"""The memory of a step is said before it is taken: against the tensors of a real training, and refused in time."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nestling import memory as module
from nestling.arch.architecture import Architecture
from nestling.arch.search import SearchSpace
from nestling.arch.submodel import WHOLE, Submodel
from nestling.data.batches import Batch, Stage
from nestling.errors import NestlingError
from nestling.memory import check_memory, memory
from nestling.model import conv, scan
from nestling.model.native import library
from nestling.model.nemotron_h import NemotronH
from nestling.recipe import budget_targets
from nestling.sections import StageSection, TrainSection
from nestling.train.checkpoints import Run
from nestling.train.elastic import Distillation, distill
from nestling.train.footprint import Alive, _of_all_blocks, footprint
from nestling.train.objective import Objective
from nestling.train.optimize import Optimization
from nestling.train.pretrain import initialize

MODEL = Architecture(
    "M-M*-M-",
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=256,
    n_groups=2,
    mamba_num_heads=4,
    mamba_head_dim=32,
    ssm_state_size=32,
    num_key_value_heads=2,
    num_attention_heads=4,
    head_dim=16,
)
MIXTURE = replace(
    MODEL,
    hybrid_override_pattern="MEM*EM",
    n_routed_experts=8,
    moe_intermediate_size=96,
    moe_shared_expert_intermediate_size=128,
)
STAGE = StageSection(steps=2, batch=4, length=192)


def section(**given: Any) -> TrainSection:
    values = {"budgets": ("60%",), "learning_rate": 1e-3, "router_steps": 1, "search_space": {"hidden_size": (32,)}}
    return TrainSection(**{**values, "stages": (STAGE,), "sizes": {"60%": {"hidden_size": 32}}, **given})


@pytest.mark.parametrize(
    "given",
    [{"optimizer": "adamw"}, {"micro_batch": 1}, {"activation_checkpointing": True}, {"precision": "bf16"},
     {"objective": {"chunk": 64}}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("model", [MODEL, MIXTURE], ids=["dense", "experts"])
def test_the_estimate_is_what_the_tensors_of_a_training_come_to(
    tmp_path: Path, model: Architecture, given: dict[str, Any], each_path: str
) -> None:
    how = section(**given)
    kept = {k: v for k, v in how.model_dump().items() if k in Distillation.__dataclass_fields__}
    settings = Distillation(
        **kept | {"stages": (Stage(STAGE.steps, STAGE.batch),), "objective": Objective(**how.objective.model_dump())}
    )

    def data(stage: int, step: int) -> Batch:
        ids = torch.randint(model.vocab_size, (STAGE.batch, 193), generator=torch.Generator().manual_seed(step))
        return Batch(ids[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool))

    student, teacher = initialize(NemotronH(model), 0), initialize(NemotronH(model), 1)
    teacher = teacher.bfloat16() if how.precision == "bf16" else teacher
    family = {"100%": WHOLE, "60%": Submodel(hidden_size=32)}
    space, run = SearchSpace.of(model, how.search_space), Run(tmp_path / "s", "", "train")
    with Alive() as alive:
        for parameter in [*student.parameters(), *teacher.parameters()]:
            alive.count(parameter)
        distill(student, teacher, data, settings, budget_targets(model, how), 0, run, space=space, family=family)
    assert 0.87 < alive.peak / memory(model, how)["total"] < 1.15


def test_kernels_are_counted_where_they_take_part(each_path: str) -> None:
    by_hand, routed = memory(MODEL, section()), memory(MODEL, section(sizes={}))
    assert memory(MODEL, section(), gpu=True) == routed  # soft masks go past most kernels
    assert (by_hand["step"] < routed["step"]) == (each_path == "kernels")


def test_nothing_is_built_to_count_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = memory(MODEL, section())
    _of_all_blocks.cache_clear()
    monkeypatch.setattr(library, "library", lambda: pytest.fail("the library was asked for"))
    assert memory(MODEL, section()) == wanted


def test_micro_batches_beyond_the_batch_need_no_more_than_it() -> None:
    assert memory(MODEL, section(micro_batch=64)) == memory(MODEL, section(micro_batch=STAGE.batch))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_few_pieces_of_a_sequence_tell_what_all_hold(monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    wide = replace(MODEL, hybrid_override_pattern="M-M*", mamba_num_heads=32, mamba_head_dim=16)
    how = Optimization(
        learning_rate=1e-3, warmup=1, decay=0.0, weight_decay=0.0, activation_checkpointing=checkpointing
    )
    few = footprint(wide, how, Objective(), 2000)
    _of_all_blocks.cache_clear()
    lengths = []

    def every(pieces: Sequence[Any], _: torch.Tensor) -> Sequence[Any]:
        lengths.append(len(pieces))
        return pieces

    for user in (scan, conv):
        monkeypatch.setattr(user, "enough", every)
    assert footprint(wide, how, Objective(), 2000) == few
    assert min(lengths) > 3


def test_what_does_not_fit_is_refused_and_says_what_takes_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = memory(MODEL, section())
    monkeypatch.setattr(module, "available", lambda: needed["total"] - 1)
    with pytest.raises(NestlingError, match=r"training needs about .* \(master weights .* step .*\), and .* are free"):
        check_memory(needed, "the training")
    for free in (needed["total"], None):
        monkeypatch.setattr(module, "available", lambda free=free: free)
        check_memory(needed, "the training")


def test_what_is_free_is_a_part_of_what_there_is() -> None:
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < module.available() < there
