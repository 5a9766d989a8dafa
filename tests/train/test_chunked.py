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
from nestling.sections import CHUNK_BYTES, LEAST_CHUNK
from nestling.train import chunked
from nestling.train.chunked import chunk_of, distilled
from nestling.train.footprint import Alive
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
@pytest.mark.parametrize("chunk", [4, None])
def test_a_student_learns_what_its_whole_logits_teach(
    untied: bool, submodel: Submodel, extra: dict[str, Any], chunk: int | None
) -> None:
    """At the positions that count, and nowhere else."""
    shape, part = replace(stock.TINY, untied=untied), batch()
    teacher = stock.randomize(NemotronH(shape, dtype=torch.float64), 1)
    student, widths = stock.randomize(NemotronH(shape, dtype=torch.float64), 0), hard(shape, submodel)
    objective = Objective(chunk=chunk, **extra)
    learnt = student_loss(student, widths, teacher, objective, teach(teacher, part, 1.0))
    with torch.no_grad():
        said = teacher(part.inputs_BL).logits[part.counted_BL]
    logits = student(part.inputs_BL, widths).logits[part.counted_BL]
    losses = learnt, plain(objective, logits, said, part.targets_BL[part.counted_BL])
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)
    named = dict(student.on_disk())
    found, wanted = (
        torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True) for loss in losses
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert all(slope.any() for slope in found)


def test_hidden_states_are_matched_too() -> None:
    model = stock.randomize(NemotronH(stock.TINY), 0)
    widths, objective = hard(stock.TINY, Submodel(hidden_size=10)), Objective(hidden=1.0)
    part = batch()
    with torch.no_grad():
        both = [model.hidden(part.inputs_BL, w)[part.counted_BL] for w in (widths, None)]
        losses = [student_loss(model, widths, model, o, teach(model, part, 1.0)) for o in (objective, Objective())]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_chunk_is_bounded_in_bytes(dtype: torch.dtype) -> None:
    def head(vocabulary: int) -> Tensor:
        return torch.empty(1, dtype=dtype).expand(vocabulary, 1)

    assert chunk_of(Objective(), head(2**14)) * 2**14 * dtype.itemsize == CHUNK_BYTES
    least = LEAST_CHUNK // dtype.itemsize  # less would starve the product
    assert chunk_of(Objective(), head(131072)) == chunk_of(Objective(), head(2**30)) == least
    assert chunk_of(Objective(chunk=5), head(131072)) == 5
    with torch.autocast("cpu", torch.bfloat16):
        assert chunk_of(Objective(), torch.empty(131072, 1)) == LEAST_CHUNK // 2


def in_bf16(objective: Objective, values: list[Tensor], targets: Tensor) -> list[Tensor]:
    """The loss and the gradients of float32 tensors, multiplied in bf16."""
    given = [value.float().requires_grad_() for value in values]
    with torch.autocast("cpu", torch.bfloat16):
        loss = distilled(objective, *given, targets)
    return [loss.detach(), *torch.autograd.grad(loss, given[:2])]


@pytest.mark.usefixtures("each_path", "poisoned")
@pytest.mark.parametrize(("chunk", "block"), [(7, 1), (3, 20), (1, 4), (64, 2**22)])
def test_in_bf16_the_gradient_of_a_head_is_summed_in_float32(
    chunk: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of the vocabulary at a time, of any size."""
    monkeypatch.setattr(chunked, "HEAD_BLOCK", block)
    positions = 24
    values = [random(*s, seed=i) for i, s in enumerate([(positions, HIDDEN), (VOCABULARY, HIDDEN)] * 2)]
    targets = torch.arange(positions) % VOCABULARY
    exact = [value.clone().requires_grad_() for value in values]
    wanted = plain(Objective(cross_entropy=0.5), exact[0] @ exact[1].T, exact[2] @ exact[3].T, targets)
    expected = [wanted.detach(), *torch.autograd.grad(wanted, exact[:2])]
    found = in_bf16(Objective(cross_entropy=0.5, chunk=chunk), values, targets)
    for got, known in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        assert (got - known).norm() < 0.02 * known.norm()


@pytest.mark.usefixtures("each_path")
def test_in_bf16_sums_over_many_chunks_and_blocks_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed in bf16 both would stop to grow."""
    objective = Objective(cross_entropy=1, chunk=4)
    hidden, head = torch.ones(4096, 1), torch.zeros(2, 1)
    _, _, by_head = in_bf16(objective, [hidden, head, hidden, head], torch.zeros(4096).long())
    torch.testing.assert_close(by_head, torch.tensor([[-0.5], [0.5]]), rtol=1e-3, atol=0)
    monkeypatch.setattr(chunked, "HEAD_BLOCK", 1)
    hidden, head = torch.zeros(1, 1), torch.arange(4096).sign()[:, None]
    _, by_hidden, _ = in_bf16(objective, [hidden, head, hidden, head], torch.zeros(1).long())
    torch.testing.assert_close(by_hidden, torch.ones(1, 1), rtol=1e-3, atol=0)


def test_in_bf16_gradients_of_a_head_are_made_a_block_at_a_time(
    each_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, hidden, positions = 4096, 64, 16
    values = [torch.randn(*shape) for shape in [(positions, hidden), (vocabulary, hidden)] * 2]
    peaks = []
    for block in (2**12, 2**22):
        monkeypatch.setattr(chunked, "HEAD_BLOCK", block)
        with Alive() as alive:
            in_bf16(Objective(chunk=4), values, torch.arange(positions))
        peaks.append(alive.peak / (4 * vocabulary * hidden))
    assert peaks[1] > 2  # the gradient in float32, and both heads in bf16
    assert (peaks[1] - peaks[0] > 0.9) == (each_path == "kernels")  # two whole gradients in bf16, old and new
