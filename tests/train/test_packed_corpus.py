"""Packed rows teach what each document alone would: logits, loss and gradients in float64, through the whole model."""

import pytest
import test_packing as rows
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestling.arch.architecture import Architecture
from nestling.model.nemotron_h import NemotronH
from nestling.train.data import Batch
from nestling.train.objective import cross_entropy
from nestling.train.pretrain import initialize

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
            loss = cross_entropy(logits, part.targets_BL, part.counted_BL)
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
