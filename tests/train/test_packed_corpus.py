"""Packed rows teach what each document alone would: logits, loss and gradients in float64, through the whole model."""

from pathlib import Path

import pytest
import test_packing as rows
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestling.arch.architecture import Architecture
from nestling.arch.submodel import Submodel
from nestling.data.batches import Batch, Stage
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard
from nestling.train.checkpoints import Run
from nestling.train.objective import Objective
from nestling.train.pretrain import Pretraining, initialize, pretrain
from nestling.train.teaching import student_loss, teach

MODEL = Architecture(
    "M*-M",
    vocab_size=400,  # as many as a corpus of the strategy has tokens
    hidden_size=8,
    intermediate_size=12,
    n_groups=2,
    mamba_num_heads=4,
    mamba_head_dim=3,
    ssm_state_size=4,
    num_key_value_heads=1,
    num_attention_heads=2,
    head_dim=4,
    use_conv_bias=True,
)


@pytest.fixture(scope="module")
def model() -> NemotronH:
    made = initialize(NemotronH(MODEL, dtype=torch.float64), seed=1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return made


def loss_and_gradients(model: NemotronH, batches: list[Batch]) -> tuple[Tensor, list[Tensor]]:
    """Of the mean over all counted targets of all batches, in the parts that training uses."""
    model.zero_grad()
    count = sum(int(batch.counted_BL.sum()) for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        for part, share in batch.parts(2):
            logits = model(part.inputs_BL, documents_BL=part.documents_BL).logits
            loss = F.cross_entropy(logits[part.counted_BL], part.targets_BL[part.counted_BL])
            total = total + share * loss * batch.counted_BL.sum() / count
    total.backward()
    return total.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@settings(max_examples=10)
@given(documents=rows.texts(marked=True), length=st.integers(1, 90), batch=st.integers(1, 4))
def test_packed_is_unpacked(model: NemotronH, documents: rows.Documents, length: int, batch: int) -> None:
    packed = list(rows.corpus(documents).reading(batch, length).all())
    alone = list(rows.corpus(documents, packing=False).reading(1, length).all())
    assert sum(part.tokens for part in packed) == sum(part.tokens for part in alone)
    loss, gradients = loss_and_gradients(model, packed)
    expected, by_hand = loss_and_gradients(model, alone)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # shares are Python floats of float32 sums
    for ours, theirs in zip(gradients, by_hand, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@settings(max_examples=10)
@given(documents=rows.texts(least=3), length=st.integers(20, 90))
def test_every_document_of_a_packed_row_has_the_logits_it_has_alone(
    model: NemotronH, documents: rows.Documents, length: int
) -> None:
    for batch in rows.corpus(documents).reading(2, length).all():
        with torch.no_grad():
            whole = model(batch.inputs_BL, documents_BL=batch.documents_BL).logits
            for row, documents_L in enumerate(batch.documents_BL):
                for document in documents_L.unique().tolist():
                    here = (documents_L == document) & batch.real_BL[row]
                    if here.any():
                        alone = model(batch.inputs_BL[row][here][None]).logits[0]
                        torch.testing.assert_close(whole[row][here], alone, rtol=1e-9, atol=1e-11)


DOCUMENTS = [(list(range(first, first + size)), [True] * size) for first, size in ((1, 9), (20, 14), (50, 6), (80, 11))]


@pytest.mark.parametrize("chunk", [None, 5], ids=["one chunk", "in chunks"])
def test_students_learn_from_packed_rows_what_documents_teach_alone(model: NemotronH, chunk: int | None) -> None:
    teacher = initialize(NemotronH(MODEL, dtype=torch.float64), seed=3)
    widths, objective = hard(MODEL, Submodel(hidden_size=6)), Objective(cross_entropy=0.5, chunk=chunk)

    def learnt(batches: list[Batch]) -> float:
        counts = [int(batch.counted_BL.sum()) for batch in batches]
        losses = [student_loss(model, widths, teacher, objective, teach(teacher, b, 1.0)) for b in batches]
        return sum(count * float(loss.detach()) for count, loss in zip(counts, losses, strict=True)) / sum(counts)

    packed = list(rows.corpus(DOCUMENTS).reading(2, 24).all())
    assert any(int(row.unique().numel()) > 1 for batch in packed for row in batch.documents_BL)
    assert learnt(packed) == pytest.approx(learnt(list(rows.corpus(DOCUMENTS, packing=False).reading(1, 24).all())))


def test_a_parent_learns_from_packed_rows_what_documents_teach_alone(tmp_path: Path) -> None:
    (packed,) = rows.corpus(DOCUMENTS).reading(4, 24).all()
    how = Pretraining((Stage(1, 4),), learning_rate=1e-3, warmup=1, decay=0.5, weight_decay=0.0)
    _, said = pretrain(MODEL, lambda stage, step: packed, how, 1, Run(tmp_path / "s", "same", "train parent"))
    fresh = initialize(NemotronH(MODEL), seed=1)
    losses = []
    for ids, _ in DOCUMENTS:
        with torch.no_grad():
            chances = fresh(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        losses += [-float(chances[place, target]) for place, target in enumerate(ids[1:])]
    assert said[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
