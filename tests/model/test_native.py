"""The kernels in C++ against the recurrence, one token after the other, in float64; and where they cannot be built."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.test_packed import numbers, slow_recurrence
from model.test_ssd import inputs
from nestling.arch.axes import Layout
from nestling.model.native import library
from nestling.model.native import losses as native_losses
from nestling.model.native.pointwise import squared_relu
from nestling.model.native.product import kernel, product, tiled
from nestling.model.ssd import causal_conv, ssd
from nestling.model.width import Width, in_place, prefix
from nestling.train.objective import Objective, graded

if library.library() is None:
    pytest.skip("no C++ compiler here", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned")


ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 1e-2}


def close(found: Any, expected: Any, dtype: torch.dtype) -> None:
    """The first is of that dtype; vectors beside bfloat16, and what follows from them, are float32."""
    assert found[0].dtype == dtype
    least = 1.0
    if dtype == torch.bfloat16:
        # what nearly cancels is as uncertain as larger gradients that follow from the same rounded numbers
        least = max(float(other.detach().norm()) for other in expected) / 3
    for one, other in zip(found, expected, strict=True):
        assert one.dtype in (dtype, library.summed_in(dtype))
        assert (one - other).norm() <= ROUNDING[dtype] * other.norm().clamp(min=least)


def inside(t: Tensor, dim: int) -> Tensor:
    """The same values as a part of a wider tensor, as splits of a projection are."""
    return F.pad(t.movedim(dim, -1), (3, 4)).movedim(-1, dim).contiguous().narrow(dim, 3, t.shape[dim])


def documents_of(length: int, cuts: list[int]) -> list[int]:
    """The lengths of the documents between cuts."""
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < length}), length]
    return [last - first for first, last in zip(edges, edges[1:], strict=False)]


def each_alone(
    cut: list[int], x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = []
    for index, (x_, dt_, B_, C_) in enumerate(zip(*(value.split(cut, 1) for value in (x, dt, B, C)), strict=True)):
        y, S = slow_recurrence(x_, dt_, A, B_, C_, D, torch.zeros_like(S) if index else S)
        outputs.append(y)
    return torch.cat(outputs, 1), S


def with_gradients(values: list[Tensor], run: Any) -> list[Tensor]:
    values = [value.detach().requires_grad_() for value in values]
    outputs = run(*values)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs]  # the same in all
    return [*outputs, *torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)), values)]


@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 150, 2, 5, 37, 37))),
    cuts=st.lists(st.integers(0, 150), max_size=3),
    chunk=st.sampled_from([5, 16, 64, 70]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_a_scan_of_any_size_is_the_recurrence(
    sizes: tuple[int, ...], cuts: list[int], chunk: int, dtype: torch.dtype, seed: int
) -> None:
    batch, length, groups, heads, channels, state = sizes
    values = inputs(length, seed, batch, groups, heads, channels, state)
    values[3:5] = [value / state**0.5 for value in values[3:5]]
    cut = documents_of(length, cuts)
    documents = numbers(cut).expand(batch, -1)
    expected = with_gradients(values, lambda *given: each_alone(cut, *given))
    found = with_gradients(
        [value.to(dtype) for value in values],
        lambda x, dt, A, B, C, D, S: ssd(inside(x, 2), dt, A, inside(B, 2), inside(C, 2), D, S, chunk, documents),
    )
    close(found, expected, dtype)
    with torch.no_grad():
        close(ssd(*(v.to(dtype) for v in values), chunk, documents), expected[:2], dtype)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_the_heads_of_a_group_can_be_divided(threads: None) -> None:
    values = inputs(70, batch=1, g=1, h=7, p=16, n=16)
    expected = with_gradients(values, slow_recurrence)
    close(with_gradients(values, lambda *given: ssd(*given, chunk=16)), expected, torch.float64)


@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 150, 60))),
    taps=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 150), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_a_convolution_of_any_size_is_torchs_of_each_document(
    sizes: tuple[int, ...], taps: int, cuts: list[int], dtype: torch.dtype, seed: int
) -> None:
    batch, length, channels = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, length, channels), (taps, channels), (channels,), (batch, taps - 1, channels)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    cut = documents_of(length, cuts)
    documents = numbers(cut).expand(batch, -1)

    def torchs(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor) -> list[Tensor]:
        found = []
        for index, document in enumerate(x.split(cut, 1)):
            seen = torch.cat([torch.zeros_like(window) if index else window, document], 1).mT
            found.append(F.silu(F.conv1d(seen, weight.mT[:, None], bias, groups=channels)).mT)
        return [torch.cat(found, 1)]

    def ours(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor) -> list[Tensor]:
        return [causal_conv(inside(x, 2), weight, bias, inside(window, 2), documents)[0]]

    expected = with_gradients(values, torchs)
    close(with_gradients([value.to(dtype) for value in values], ours), expected, dtype)


@settings(max_examples=60)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (600, 90, 90))),
    name=st.sampled_from(["few", "many"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_product_of_some_rows_is_torchs(
    sizes: tuple[int, ...], name: str, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    rows, outputs, columns = sizes
    generator = torch.Generator().manual_seed(seed)
    x, b = torch.randn(rows, columns, generator=generator), torch.randn(outputs, generator=generator)
    weight = torch.randn(outputs + 1, columns + 3, generator=generator).to(dtype)[1:, 1 : columns + 1]
    x, b = x.to(dtype), b.to(dtype)
    found = product(name, x, weight, b if bias else None)
    assert found.dtype == dtype
    expected = F.linear(x.double(), weight.double(), b.double() if bias else None)
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    each = torch.cat([product(name, x[row : row + 1], weight, b if bias else None) for row in range(rows)])
    assert torch.equal(found, each)  # what else is computed with a row changes nothing


def cut_inside(groups: int, heads: int, channels: int, kept: tuple[int, ...]) -> tuple[Width, tuple[Layout, Layout]]:
    """A width that cuts inside groups; layouts of a matrix with rows in pieces, and of one with columns in pieces."""
    full = {"g": groups, "h": heads, "p": channels, "d": 70, "n": 7}
    inner, state, hidden = ("g", "h", "p"), ("g", "n"), ("d",)
    width = Width(full, full | {"h": min(heads, kept[0]), "p": min(channels, kept[1]), "d": kept[2]})
    return width, (Layout(((inner, state, ("g", "h")), (hidden,))), Layout(((hidden,), (inner,))))


@settings(max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 3), st.integers(1, 9), st.integers(1, 40)),
    kept=st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 50)),
    name=st.sampled_from(["few", "many"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_a_weight_in_pieces_is_multiplied_as_if_packed(
    sizes: tuple[int, ...], kept: tuple[int, ...], name: str, dtype: torch.dtype, seed: int
) -> None:
    count, groups, heads, channels = sizes
    generator = torch.Generator().manual_seed(seed)
    width, layouts = cut_inside(groups, heads, channels, kept)
    for layout in layouts:
        weight = torch.randn(layout.shape(width.full), generator=generator).to(dtype)
        packed = prefix(weight, layout, width)
        x = torch.randn(count, packed.shape[1], generator=generator).to(dtype)
        found = product(name, x, in_place(weight, layout, width), None)
        torch.testing.assert_close(found.double(), x.double() @ packed.double().mT, rtol=1e-2, atol=1e-2)
        if dtype == torch.float32:
            torch.testing.assert_close(found, x @ packed.mT, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not tiled(), reason="this processor multiplies no tiles")
@settings(max_examples=60)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (90, 3, 9, 40))),
    kept=st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 70)),
    bias=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_tiles_lose_no_more_than_a_float_product(
    sizes: tuple[int, ...], kept: tuple[int, ...], bias: bool, threads: int, seed: int
) -> None:
    count, groups, heads, channels = sizes
    generator = torch.Generator().manual_seed(seed)
    width, layouts = cut_inside(groups, heads, channels, kept)
    torch.set_num_threads(threads)
    for layout in layouts:
        weight = torch.randn(layout.shape(width.full), generator=generator).bfloat16()
        packed = prefix(weight, layout, width)
        x = torch.randn(count, packed.shape[1], generator=generator)
        b = torch.randn(len(packed), generator=generator) if bias else None
        exact = x.double() @ packed.double().mT + (b if bias else 0)
        alone = torch.full((len(packed) + 2, packed.shape[1] + 40), torch.nan).bfloat16()  # what is around is not read
        alone[1:-1, 3 : packed.shape[1] + 3] = packed
        for given_ in (in_place(weight, layout, width), alone[1:-1, 3 : packed.shape[1] + 3]):
            found = product("tiled", x, given_, b)
            close([found], [exact], torch.float32)
            assert (found - exact).norm() <= 2e-5 * exact.norm() + 1e-5
            assert torch.equal(found[-1:], product("tiled", x[-1:], given_, b))
    torch.set_num_threads(1)


def test_kernels_multiply_only_what_suits_them() -> None:
    x, weight = torch.zeros(4, 512), torch.zeros(600, 512)
    with torch.no_grad():
        assert kernel(x, weight) == "few"
        assert kernel(x[:, :256], weight[:, :256]) is None  # small
        assert kernel(x[:, :256], weight[:, :256], pieces=True) == "few"
        assert kernel(torch.zeros(2, 20, 512), weight) == "many"
        assert kernel(torch.zeros(100, 512), weight) is None
        assert kernel(torch.zeros(100, 512), weight, pieces=True) == "many"
        assert kernel(x, weight.double()) is None
        assert kernel(x, torch.zeros(512, 600).mT) is None
        assert kernel(x[:0], weight) is None
        assert kernel(torch.zeros(2, 2, 512, device="meta"), weight) is None
        assert kernel(x[:1].bfloat16(), weight.bfloat16()) == "few"
        with torch.autocast("cpu", torch.bfloat16):
            assert kernel(x, weight) is None
    assert kernel(x, weight) is None  # it has no gradient


@given(
    rows=st.integers(1, 5),
    vocabulary=st.integers(1, 3000),
    scale=st.sampled_from([0.1, 3.0, 200.0]),
    taught=st.sampled_from([(1.0, 0.0), (1.0, 0.7), (0.5, 0.0), (3.0, 0.0), None]),
    share=st.sampled_from([1.0, 0.3]),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 99),
)
@settings(max_examples=100)
def test_losses_and_their_gradients_are_torchs(
    rows: int,
    vocabulary: int,
    scale: float,
    taught: tuple[float, float] | None,
    share: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(rows, vocabulary, generator=generator).to(dtype) for _ in range(2))
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    temperature, ce = taught or (1.0, 0.7)
    logits = student.double().requires_grad_()
    expected = ce * F.cross_entropy(logits, targets, reduction="sum")
    if taught:
        wanted = (teacher.double() / temperature).softmax(-1)
        given_ = (logits / temperature).log_softmax(-1)
        expected = expected + temperature**2 * F.kl_div(given_, wanted, reduction="sum")
    (slope,) = torch.autograd.grad(expected, logits)
    assert native_losses.suits(student, teacher)
    objective = Objective(temperature, cross_entropy=ce)
    found = graded(objective, student.clone(), teacher if taught else None, targets, share)
    rounding = 1e-12 if dtype == torch.float64 else 1e-5
    assert found[0].dtype == library.summed_in(dtype)
    assert found[1].dtype == dtype
    assert (found[0] - expected).abs() <= rounding * max(1, scale) * rows
    last = 2**-8 if dtype == torch.bfloat16 else 0.0  # each number is rounded once
    assert ((found[1] - share * slope).abs() <= last * share * slope.abs() + rounding * max(1, scale) * rows).all()


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_a_squared_relu_of_what_is_not_finite(dtype: torch.dtype) -> None:
    x = torch.tensor([-torch.inf, torch.inf, torch.nan, -1, -0.0, 2] * 7, dtype=dtype)
    dy = torch.ones_like(x)
    torch.testing.assert_close(squared_relu(x), torch.relu(x).square(), equal_nan=True)
    torch.testing.assert_close(squared_relu(x, dy), 2 * torch.relu(x), equal_nan=True)


@pytest.mark.parametrize("vocabulary", [*range(1, 36), 50257])
def test_losses_of_any_vocabulary_stay_in_their_room(vocabulary: int) -> None:
    logits = torch.linspace(-3, 3, vocabulary).expand(2, -1)
    found = graded(Objective(), logits.bfloat16(), logits.flip(1).bfloat16(), torch.zeros(2))
    expected = graded(Objective(), logits.bfloat16().float(), logits.flip(1).bfloat16().float(), torch.zeros(2))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1].bfloat16())


def test_losses_of_what_is_not_finite() -> None:
    logits, targets = torch.zeros(3, 40), torch.tensor([1, 2, 3])
    logits[0, 7], logits[1, 7], logits[2, 7] = -float("inf"), float("nan"), float("inf")
    found = graded(Objective(cross_entropy=1), logits[:1].clone(), None, targets[:1])[0]
    torch.testing.assert_close(found, F.cross_entropy(logits[:1], targets[:1]))
    for row in (1, 2):
        assert graded(Objective(cross_entropy=1), logits[row : row + 1].clone(), None, targets[row : row + 1])[
            0
        ].isnan()


PROGRAM = """
import torch, sys
from nestling.arch.architecture import Architecture
from nestling.model.attention import _attend
from nestling.model.context import Context
from nestling.model.native import library
from nestling.model.nemotron_h import NemotronH
from nestling.model.ssd import ssd
from nestling.model.width import product
from nestling.train.objective import Objective, graded
if sys.argv[1:]:
    library.TUNED = tuple(sys.argv[1:])
print(library.library() is not None)
sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 30, "n_groups": 2, "mamba_num_heads": 6}
more = {"mamba_head_dim": 20, "ssm_state_size": 9, "num_key_value_heads": 1, "num_attention_heads": 2, "head_dim": 16}
shape = Architecture("M*-", **sizes, **more)
for dtype in torch.float32, torch.float64:
    torch.manual_seed(0)
    shapes = (2, 90, 2, 3, 24), (2, 90, 2, 3), (2, 3), (2, 90, 2, 21), (2, 90, 2, 21), (2, 3)
    x, dt, A, B, C, D = (torch.rand(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    y = ssd(x, dt, A.neg(), B, C, D, chunk=42)[0]
    y.square().sum().backward()
    found = [y, x.grad, dt.grad, A.grad, B.grad, C.grad]
    query, key, value = (torch.rand(2, h, 90, 21, dtype=torch.float64).to(dtype).requires_grad_() for h in (6, 2, 2))
    documents = torch.arange(90).expand(2, -1) // 37
    y = _attend(query, key, value, Context.of(x.flatten(2), None, None, documents_BL=documents))
    y.square().sum().backward()
    found += [y, query.grad, key.grad, value.grad]
    tokens, weight = torch.rand(40, 500).to(dtype), torch.rand(600, 500).to(dtype)
    with torch.no_grad():
        found += [product(tokens, weight), product(tokens[:5], weight)]
        found += graded(Objective(), tokens.log(), weight[:40].log(), torch.zeros(40))
    model = NemotronH(shape, dtype=dtype)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64).to(dtype)
    logits = model(torch.arange(160).view(2, 80) % 37, documents_BL=documents[:, :80]).logits
    (logits * torch.randn(logits.shape, dtype=torch.float64).to(dtype)).sum().backward()
    found += [parameter.grad for parameter in model.parameters()]
    print(*(value.double().square().sum().item() for value in found))
"""


def elsewhere(place: Path, *tuned: str, **changed: str) -> tuple[bool, Tensor, str]:
    """Whether there were kernels, what they computed, and what was said, in a process that has built nothing yet."""
    environment = os.environ | {"XDG_CACHE_HOME": str(place), "PYTHONWARNINGS": "ignore"} | changed
    command = [sys.executable, "-c", PROGRAM, *tuned]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    there, *values = run.stdout.splitlines()
    return (
        there == "True",
        torch.tensor([[float(x) for x in line.split()] for line in values], dtype=torch.float64),
        run.stderr,
    )


def test_without_kernels_torch_does_the_same(tmp_path: Path) -> None:
    there, expected, _ = elsewhere(tmp_path, NESTLING_KERNELS="off")
    assert not there
    assert not any(tmp_path.iterdir())
    none, value, said = elsewhere(tmp_path, PATH=str(tmp_path))
    assert not none
    assert torch.equal(value, expected)
    assert not said
    broken, value, said = elsewhere(tmp_path, CXX="false")
    assert not broken
    assert torch.equal(value, expected)
    assert "the kernels could not be built with false, torch's operations are used" in said
    nowhere, value, said = elsewhere(tmp_path, XDG_CACHE_HOME="/dev/null")
    assert not nowhere
    assert torch.equal(value, expected)
    assert "/dev/null" in said


def test_kernels_are_for_this_processor_or_not_at_all(tmp_path: Path) -> None:
    """Built for any processor they would be slower than torch, and nobody would be told."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *native*) echo "no such processor" >&2; exit 1;; esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o700)
    there, _, said = elsewhere(tmp_path, CXX=str(compiler))
    assert not there
    assert "no such processor" in said


@pytest.mark.skipif(platform.machine() != "x86_64", reason="processors of other makes have other names")
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_on_processors_with_shorter_vectors(tmp_path: Path, processor: str) -> None:
    there, value, _ = elsewhere(tmp_path, f"-march={processor}", "-mtune=generic")
    _, expected, _ = elsewhere(tmp_path, NESTLING_KERNELS="off")
    assert there
    torch.testing.assert_close(value[0], expected[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(value[1], expected[1], rtol=1e-12, atol=0)
    (built,) = (tmp_path / "nestling").iterdir()
    written = built.stat().st_mtime_ns
    elsewhere(tmp_path, f"-march={processor}", "-mtune=generic")
    assert built.stat().st_mtime_ns == written  # it is built once
    if processor == "haswell":
        built.write_bytes(b"damaged")
        there, again, said = elsewhere(tmp_path, f"-march={processor}", "-mtune=generic")
        assert there
        assert torch.equal(again, value)
        assert not said
