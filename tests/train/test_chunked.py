"""The chunked head: F.kl_div in float64, values and gradients; and no tensor as large as tokens x vocabulary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stock
from nestling.arch.submodel import Submodel
from nestling.data.batches import Batch
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard
from nestling.sections import CHUNK_LOGITS, LEAST_CHUNK
from nestling.train.chunked import chunk_of, distilled
from nestling.train.objective import Objective, hidden_matching
from nestling.train.teaching import student_loss, teach

POSITIONS, WIDE, HIDDEN, TAUGHT, VOCABULARY = 7, 6, 4, 5, 11


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(objective: Objective, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """The whole logits of both, one position after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for q, p, target in zip(student, teacher, targets, strict=True):
        places = p.argsort(descending=True)[: objective.top_k]
        wanted = (p[places] / objective.temperature).softmax(0)
        given_ = (q / objective.temperature).softmax(0)[places].log()
        total = total + objective.temperature**2 * F.kl_div(given_, wanted, reduction="sum")
        total = total - objective.cross_entropy * q.softmax(0)[target].log()
    return total / len(student)


@given(
    chunk=st.integers(1, POSITIONS + 1),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    top_k=st.sampled_from([None, 1, 4, VOCABULARY, 99]),
    cross_entropy=st.sampled_from([0.0, 0.7]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 2**30),
)
def test_chunks_are_the_plain_formula_through_a_prefix_of_the_head(
    chunk: int, temperature: float, top_k: int | None, cross_entropy: float, scale: float, seed: int
) -> None:
    objective = Objective(temperature, top_k, cross_entropy, chunk=chunk)
    hidden = (scale * random(POSITIONS, HIDDEN, seed=seed)).requires_grad_()
    head = random(VOCABULARY, WIDE, seed=seed + 1).requires_grad_()  # wider than what the student uses of it
    teacher, teacher_head = random(POSITIONS, TAUGHT, seed=seed + 2), random(VOCABULARY, TAUGHT, seed=seed + 3)
    targets = torch.arange(POSITIONS) % VOCABULARY
    ours = distilled(objective, hidden, head[:, :HIDDEN], teacher, teacher_head, targets)
    wanted = plain(objective, hidden @ head[:, :HIDDEN].T, teacher @ teacher_head.T, targets)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)
    got, expected = (torch.autograd.grad(3 * loss, (hidden, head)) for loss in (ours, wanted))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    assert not got[1][:, HIDDEN:].any()


def test_hidden_matching_is_the_relative_squared_gap_of_the_shared_channels() -> None:
    student, teacher = random(3, 4, seed=0).requires_grad_(), random(3, 6, seed=1)
    wanted = sum(((s - t) @ (s - t)) / (t @ t) for s, t in zip(student, teacher[:, :4], strict=True)) / 3
    torch.testing.assert_close(hidden_matching(student, teacher), wanted)
    assert hidden_matching(teacher[:, :2], teacher) == 0
    objective = Objective(hidden=0.5, chunk=2)
    heads = random(5, 4, seed=2), random(5, 6, seed=3)
    both = [distilled(o, student, heads[0], teacher, heads[1], torch.zeros(3)) for o in (objective, Objective())]
    torch.testing.assert_close(both[0] - both[1], 0.5 * wanted)


# ---- the student


def batch(length: int = 9) -> Batch:
    ids, seen = stock.tokens(16, 3, length + 1), torch.arange(length) % 3 != 1
    return Batch(ids[:, :-1], ids[:, 1:], seen.expand(3, -1))


@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize("submodel", [Submodel(), Submodel(hidden_size=10)])
@pytest.mark.parametrize("extra", [{}, {"temperature": 2.0, "top_k": 3, "cross_entropy": 0.3}])
def test_a_student_learns_the_same_in_chunks(untied: bool, submodel: Submodel, extra: dict[str, Any]) -> None:
    shape = replace(stock.TINY, untied=untied)
    teacher = stock.randomize(NemotronH(shape, dtype=torch.float64), 1)
    gradients = []
    for chunk, chunked in ((4, True), (None, False)):
        student, objective = stock.randomize(NemotronH(shape, dtype=torch.float64), 0), Objective(chunk=chunk, **extra)
        taught = teach(teacher, objective, batch(), 1.0)
        assert taught.chunked == chunked
        student_loss(student, hard(shape, submodel), teacher, objective, taught).backward()
        gradients.append({name: parameter.grad for name, parameter in student.on_disk().items()})
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert gradients[0]["backbone.embeddings.weight"].any()


def test_hidden_states_are_matched_also_where_no_chunk_is_needed() -> None:
    model = stock.randomize(NemotronH(stock.TINY), 0)
    widths, objective = hard(stock.TINY, Submodel(hidden_size=10)), Objective(hidden=1.0)
    part = batch()
    with torch.no_grad():
        both = [model.hidden(part.inputs_BL, w)[part.counted_BL] for w in (widths, None)]
        losses = [student_loss(model, widths, model, o, teach(model, o, part, 1.0)) for o in (objective, Objective())]
    torch.testing.assert_close(losses[0] - losses[1], hidden_matching(*both), rtol=1e-4, atol=1e-5)


# ---- memory


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


@pytest.mark.parametrize("extra", [{}, {"temperature": 2.0, "top_k": 64, "cross_entropy": 0.5}])
@pytest.mark.parametrize("positions", [512, 2048])
def test_the_largest_tensor_does_not_grow_with_the_positions(positions: int, extra: dict[str, Any]) -> None:
    vocabulary, hidden, chunk = 1000, 4, 32
    student, teacher = torch.randn(positions, hidden, requires_grad=True), torch.randn(positions, hidden)
    head = torch.randn(vocabulary, hidden, requires_grad=True)
    targets = torch.arange(positions) % vocabulary
    with Largest() as seen:
        distilled(Objective(chunk=chunk, **extra), student, head, teacher, head.detach(), targets).backward()
    assert seen.numel == chunk * vocabulary < positions * vocabulary
    with Largest() as at_once:
        distilled(Objective(chunk=positions), student, head, teacher, head.detach(), targets).backward()
    assert at_once.numel == positions * vocabulary  # this way of looking sees whole logits where there are some


def test_the_default_chunk_is_bounded_in_logits() -> None:
    assert chunk_of(Objective(), 2**14) * 2**14 == CHUNK_LOGITS
    assert chunk_of(Objective(), 131072) == chunk_of(Objective(), 2**30) == LEAST_CHUNK  # less would starve the product
    assert chunk_of(Objective(chunk=5), 131072) == 5
