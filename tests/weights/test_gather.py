"""Cutting positions out of stored tensors: numpy indexing, in constant memory, and each byte read once."""

import os
import tracemalloc
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nestling.errors import NestlingError
from nestling.weights import gather as module
from nestling.weights.gather import ZERO, Buffers, gather, gather_all
from nestling.weights.header import Entry, read_header, read_tensor

CHUNKS = st.integers(1, 300)


def refused(call: Any, *words: object) -> None:
    with pytest.raises(NestlingError) as caught:
        call()
    for word in words:
        assert str(word) in str(caught.value)


def stored(directory: Path, values: np.ndarray) -> Entry:
    """An entry for these values, in a file where they are not alone."""
    file = directory / "x.safetensors"
    file.write_bytes(safetensors.numpy.save({"s": np.arange(3.0), "u": np.zeros(5, np.uint8), "t": values}))
    return {entry.name: entry for entry in read_header(file)}["t"]


def values(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 256, int(np.prod(shape)) * 8, dtype=np.uint8)
    return bits.view(dtype)[: int(np.prod(shape))].reshape(shape)


def cut(whole: np.ndarray, positions: list[np.ndarray | None]) -> np.ndarray:
    """The oracle: a border of zeros behind every dimension, where -1 leads."""
    if not whole.ndim:
        return whole
    padded = np.pad(whole, [(0, 1)] * whole.ndim)
    wanted = [
        np.arange(n) if kept is None else kept.astype(int) for n, kept in zip(whole.shape, positions, strict=True)
    ]
    return padded[np.ix_(*wanted)]


@st.composite
def dim_positions(draw: st.DrawFn, size: int, kinds: tuple[str, ...] = ()) -> np.ndarray | None:
    """None, a range, a sorted choice, a permutation, anything with repeats, or a sorted choice among zeros."""
    kind = draw(st.sampled_from(kinds or ("whole", "range", "sorted", "permuted", "anything", "padded")))
    if kind == "whole":
        return draw(st.sampled_from([None, np.arange(size)]))
    if kind == "range":
        begin = draw(st.integers(0, size))
        return np.arange(begin, draw(st.integers(begin, size)))
    if kind == "sorted":
        return np.flatnonzero(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    if kind == "permuted":
        return np.array(draw(st.permutations(range(size))))
    if kind == "padded":
        kept = np.flatnonzero(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
        places = sorted(draw(st.lists(st.integers(0, len(kept)), max_size=9)))
        return np.insert(kept, places, ZERO)
    return np.array(draw(st.lists(st.integers(0, size - 1), max_size=12)), np.int64)


shapes = st.lists(st.integers(1, 9), max_size=4).map(tuple)
dtypes = st.sampled_from([np.uint8, np.float16, np.float32, np.int64])


@settings(max_examples=300)
@given(data=st.data(), shape=shapes, dtype=dtypes, chunk_bytes=CHUNKS)
def test_gather_is_numpy_indexing(
    tmp_path_factory: Any, data: st.DataObject, shape: tuple[int, ...], dtype: Any, chunk_bytes: int
) -> None:
    whole = values(shape, dtype)
    positions = [data.draw(dim_positions(size)) for size in shape]
    entry, expected = stored(tmp_path_factory.mktemp("x"), whole), cut(whole, positions)
    with mock.patch.object(module, "RUN_BYTES", data.draw(st.sampled_from([1, 64 << 10]))):
        buffers = Buffers(data.draw(st.sampled_from([8, 64, 300, 1 << 20])))  # used again only when no piece needs them
        pieces = list(gather(entry, positions, chunk_bytes, buffers))
    assert b"".join(pieces) == expected.tobytes()
    repeats = any(kept is not None and len(kept) > size for kept, size in zip(positions, shape, strict=True))
    assert repeats or all(len(piece) <= max(chunk_bytes, entry.itemsize) for piece in pieces)


@pytest.mark.parametrize(
    ("shape", "positions"),
    [
        ((0, 3), [None, np.arange(2)]),
        ((3, 0), [np.array([2, 0]), None]),
        ((3, 0, 2), [None, None, np.array([1])]),
        ((3, 2), [np.empty(0), np.array([1])]),
        ((3, 2), [np.array([ZERO, ZERO]), np.array([1])]),
        ((3, 2), [np.array([1]), np.array([ZERO])]),
    ],
)
def test_nothing_to_read(tmp_path: Path, shape: tuple[int, ...], positions: list[Any]) -> None:
    whole = values(shape, np.float32)
    assert b"".join(gather(stored(tmp_path, whole), positions)) == cut(whole, positions).tobytes()


@settings(max_examples=150)
@given(data=st.data(), shape=shapes, dtype=dtypes, chunk_bytes=CHUNKS)
@example(data=None, shape=(6, 4), dtype=np.uint8, chunk_bytes=8)
def test_several_outputs_are_each_its_own_cut_and_nothing_is_read_twice(
    tmp_path_factory: Any, data: Any, shape: tuple[int, ...], dtype: Any, chunk_bytes: int
) -> None:
    whole = values(shape, dtype)
    entry = stored(tmp_path_factory.mktemp("x"), whole)
    kinds = ("whole", "range", "sorted", "padded")
    if data is None:
        wanted = [[np.array([0, 1, 5]), np.arange(3)], [np.array([0, ZERO, ZERO]), np.arange(2)]]
    else:
        count = data.draw(st.integers(1, 4))
        wanted = [[data.draw(dim_positions(size, kinds)) for size in shape] for _ in range(count)]
    with mock.patch.object(module, "read_into", side_effect=module.read_into) as read:
        pieces = list(gather_all(entry, wanted, chunk_bytes))
    for output, positions in enumerate(wanted):
        mine = b"".join(piece.tobytes() for number, piece in pieces if number == output)
        assert mine == cut(whole, positions).tobytes()
    seen = [byte for call in read.call_args_list for byte in range(call.args[2], call.args[2] + len(call.args[3]))]
    if len(shape) < 3:  # rows of rows are not ascending when an inner dimension is padded
        assert len(seen) == len(set(seen))


@pytest.mark.parametrize("rows", [[1, 3, 2, 4], [2, 2, 4], [4, 3, 2]])
def test_rows_whose_ends_are_as_far_apart_as_those_of_a_run(tmp_path: Path, rows: list[int]) -> None:
    whole, positions = values((6, 3), np.float32), [np.array(rows), None]
    assert b"".join(gather(stored(tmp_path, whole), positions)) == cut(whole, positions).tobytes()


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensor[0, 0], tensor[1, 1] = float("nan"), float("-inf")
    safetensors.torch.save_file({"t": tensor}, tmp_path / "t.safetensors")
    (entry,) = read_header(tmp_path / "t.safetensors")
    data = b"".join(gather(entry, [np.array([6, 1, 0]), np.array([1, 4, 0])]))
    ours = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(3, 3)
    assert torch.equal(ours.view(torch.int16), tensor[[6, 1, 0]][:, [1, 4, 0]].contiguous().view(torch.int16))


def test_a_whole_tensor_is_read_in_order_and_rows_in_runs(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"t": np.zeros((100, 64), np.float32)}, tmp_path / "x.safetensors")
    (entry,) = read_header(tmp_path / "x.safetensors")
    assert reads(entry, [None, np.arange(60)], 10_000) == [(0, 9984), (9984, 9984), (19968, 5632)]
    assert reads(entry, [None, None], 25_600) == [(0, 25_600)]
    assert reads(entry, [np.arange(50), None], 10_000) == [(0, 9984), (9984, 2816)]
    assert reads(entry, [np.r_[np.arange(90, 100), np.arange(10)], None], 10_000) == [(0, 2560), (23040, 2560)]


def reads(entry: Entry, positions: list[np.ndarray | None], chunk_bytes: int) -> list[tuple[int, int]]:
    with mock.patch.object(module, "read_into", side_effect=module.read_into) as read:
        list(gather(entry, positions, chunk_bytes))
    return [(call.args[2] - entry.start, len(call.args[3])) for call in read.call_args_list]


@pytest.mark.parametrize(
    "wanted",
    [
        [[None, None]],
        [[None, np.arange(0, 4096, 2)]],
        [[np.arange(0, 16384, 2), None]],
        [[np.arange(16384)[::-1], None]],
        [[None, None], [np.arange(8000), np.arange(3000)], [np.arange(100), None]],
        [[np.r_[np.arange(10), np.full(16374, ZERO)], None]],
    ],
    ids=["all", "columns", "rows", "reversed", "several", "padded"],
)
def test_memory_is_constant(tmp_path: Path, wanted: list[list[np.ndarray | None]]) -> None:
    header = b'{"t":{"dtype":"U8","shape":[16384,4096],"data_offsets":[0,67108864]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(tmp_path / "x.safetensors", 8 + len(header) + (1 << 26))
    (entry,) = read_header(tmp_path / "x.safetensors")
    tracemalloc.start()
    total = sum(len(piece) for _, piece in gather_all(entry, wanted, 1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = [
        np.prod([s if p is None else len(p) for s, p in zip((16384, 4096), cut, strict=True)]) for cut in wanted
    ]
    assert total == sum(expected)
    assert peak < 8 << 20


def test_positions_outside_are_refused(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"t": np.zeros((3, 2))}, file := tmp_path / "x.safetensors")
    (entry,) = read_header(file)
    refused(lambda: gather(entry, [np.array([0, 3]), None]), file, "'t'", "position 3", "dimension 0", "size is 3")
    refused(lambda: gather(entry, [None, np.array([-2])]), "position -2", "dimension 1")
    refused(lambda: gather(entry, [None]), "1 lists of positions", "[3, 2]")


def test_a_file_that_shrinks_or_vanishes_while_read(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"t": np.zeros((30, 20))}, file := tmp_path / "x.safetensors")
    (entry,) = read_header(file)
    os.truncate(file, entry.start + 100)
    refused(lambda: list(gather(entry, [None, None])), file, "ends at byte")
    refused(lambda: list(gather(entry, [np.array([29, 3]), np.arange(4)])), file, "ends at byte")
    refused(lambda: list(gather(entry, [None, np.arange(4)], buffers=Buffers(1000))), file, "ends at byte")
    refused(lambda: read_tensor(entry), file, "ends at byte")
    file.unlink()
    refused(lambda: list(gather(entry, [None, None])), file, "No such file")


@pytest.mark.parametrize(("first", "height", "in_place"), [(0, 512, True), (7, 512, True), (0, 513, False)])
def test_one_run_of_columns_is_read_to_its_place(tmp_path: Path, first: int, height: int, in_place: bool) -> None:
    buffers = Buffers(1 << 14)
    for width in (16, 12, 16):
        whole = values((height, 32), np.uint8)
        positions = [None, np.arange(first, first + width)]
        with mock.patch.object(module, "read_into", side_effect=module.read_into) as read:
            data = b"".join(gather(stored(tmp_path, whole), positions, buffers=buffers))
        assert data == cut(whole, positions).tobytes()
        assert read.called is not in_place
    assert (buffers.spaced(height, 16, 16) is not None) is in_place


def test_memory_is_used_again_when_its_last_view_is_gone() -> None:
    buffers = Buffers(1000)
    first = buffers.empty(10, 100)
    first[:] = 7
    view = first[2:4].reshape(-1)[50:]
    address = first.ctypes.data
    del first
    other = buffers.empty(10, 100)
    other[:] = 9
    assert other.ctypes.data != address
    assert (view == 7).all()
    del view
    assert buffers.empty(10, 100).ctypes.data == address
