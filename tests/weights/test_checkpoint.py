"""Reading and writing safetensors against the safetensors library, numpy indexing and over a thousand broken files."""

import copy
import json
import os
import random
import resource
import struct
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import xxhash

from nestling.errors import NestlingError
from nestling.weights.checkpoint import read_checkpoint
from nestling.weights.gather import gather
from nestling.weights.header import read_header, read_tensor
from nestling.weights.writing import Planned, WeightsWriter, write_weights
from refusal import refused

INDEX = "model.safetensors.index.json"


def raw_file(path, header, data=b"", length=None):
    """A safetensors file spelled by hand: header is a value or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def spec(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def model(path, tensors, config=None):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "nemotron_h"}))
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def sharded(path, shards, weight_map=None):
    """A directory with one file per entry of shards = {file: {tensor: array}} and an index."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    for name, tensors in shards.items():
        safetensors.numpy.save_file(tensors, path / name)
    if weight_map is None:
        weight_map = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


SHARDS = {
    "model-00001-of-00002.safetensors": {"a": np.arange(4.0)},
    "model-00002-of-00002.safetensors": {"b": np.arange(6.0)},
}
FIRST, SECOND = SHARDS


def test_header_and_values_equal_the_library(tmp_path):
    random_bytes = np.random.default_rng(0).integers(0, 255, 4096, dtype=np.uint8)
    tensors = {
        f"t.{dtype}.{len(shape)}".replace("torch.", ""): torch.from_numpy(random_bytes[: 8 * 24].copy())
        .view(dtype)[: int(np.prod(shape))]
        .reshape(shape)
        .clone()
        for dtype in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
        )
        for shape in ((), (3,), (0, 5), (2, 3, 4))
    } | {"flags": torch.tensor([True, False, True])}
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, file)
    entries = {entry.name: entry for entry in read_header(file)}
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = entries[name]
        assert (entry.shape, entry.numel, entry.itemsize) == (tuple(tensor.shape), tensor.numel(), tensor.itemsize)
        bits = np.frombuffer(bytes(tensor.flatten().view(torch.uint8).tolist()) if tensor.numel() else b"", np.uint8)
        ours = read_tensor(entry)
        assert ours.shape == entry.shape
        np.testing.assert_array_equal(ours.reshape(-1).view(np.uint8), bits)
        if tensor.dtype not in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
            assert ours.dtype == tensor.numpy().dtype
    assert read_tensor(entries["t.bfloat16.1"]).dtype == np.uint16
    assert read_tensor(entries["t.float8_e4m3fn.1"]).dtype == np.uint8


def test_unsigned_values_equal_the_library(tmp_path):
    tensors = {f"u{size}": np.array([[0, 1, 2 ** (8 * size) - 1]], f"u{size}") for size in (1, 2, 4, 8)}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    for entry in read_header(tmp_path / "x.safetensors"):
        assert read_tensor(entry).dtype == tensors[entry.name].dtype
        np.testing.assert_array_equal(read_tensor(entry), tensors[entry.name])


def test_checkpoint_single_and_sharded(tmp_path):
    tensors = {"b": np.arange(6.0).reshape(2, 3), "a": np.ones(4, np.float32)}
    config = {"hidden_size": 3, "time_step_limit": [0.0, float("inf")]}
    single = read_checkpoint(model(tmp_path / "one", tensors, config))
    assert single.config == config
    assert {name: entry.shape for name, entry in single.entries.items()} == {"b": (2, 3), "a": (4,)}
    two = read_checkpoint(str(sharded(tmp_path / "two", SHARDS)))
    assert {name: entry.file.name for name, entry in two.entries.items()} == {"a": FIRST, "b": SECOND}
    np.testing.assert_array_equal(read_tensor(two.entries["b"]), np.arange(6.0))


def test_links_into_a_cache_are_followed(tmp_path):
    model(tmp_path / "blobs", {"a": np.arange(3.0)})
    (tmp_path / "snapshot").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(Path("..") / "blobs" / name)
    read = read_checkpoint(tmp_path / "snapshot")
    np.testing.assert_array_equal(read_tensor(read.entries["a"]), np.arange(3.0))


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"", b"", ["broken safetensors header"]),
        (b"[]", b"", ["must be a JSON object, is a list"]),
        (b"null", b"", ["must be a JSON object"]),
        (b'{"t": 3', b"", ["broken safetensors header"]),
        (b'{"\xff": {}}', b"", ["broken safetensors header"]),
        (b'{"t": {}, "t": {}}', b"", ["appears twice"]),
        (b"[" * 200_000, b"", ["broken safetensors header"]),
        (b'{"t": ' + b"9" * 5000 + b"}", b"", ["broken safetensors header"]),
        ({"t": 3}, b"", ["'t'", "data type None"]),
        ({"t": spec("BF61")}, b"", ["'BF61'", "did you mean 'BF16'"]),
        ({"t": spec("F4")}, b"", ["'F4'", "allowed"]),
        ({"t": spec(["F32"])}, b"", ["data type ['F32']"]),
        ({"t": spec(shape=(-1, -2))}, b"\0" * 8, ["shape [-1, -2]"]),
        ({"t": spec(shape=(2.0,))}, b"\0" * 8, ["shape [2.0]"]),
        ({"t": spec(shape=(True, 2))}, b"\0" * 8, ["shape [True, 2]"]),
        ({"t": spec(shape=("2",))}, b"\0" * 8, ["shape ['2']"]),
        ({"t": spec(shape=(float("nan"),))}, b"\0" * 8, ["NaN is not JSON"]),
        ({"t": spec(shape=(0, 2**60), offsets=(0, 0))}, b"", ["shape"]),
        ({"t": spec("U8", (1,) * 65, (0, 1))}, b"\0", ["at most 32 sizes"]),
        ({"t": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, b"\0" * 8, ["shape 2"]),
        ({"t": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, ["data_offsets None"]),
        ({"t": spec(offsets=(0, 8, 9))}, b"\0" * 8, ["data_offsets [0, 8, 9]"]),
        ({"t": spec(offsets=(8, 0))}, b"\0" * 8, ["does not fill"]),
        ({"t": spec(offsets=(-8, 0))}, b"\0" * 8, ["data_offsets [-8, 0]"]),
        ({"t": spec(shape=(3,))}, b"\0" * 8, ["F32 [3] does not fill data_offsets [0, 8]"]),
        ({"t": spec(), "u": spec()}, b"\0" * 8, ["overlaps"]),
        ({"t": spec(), "u": spec(offsets=(4, 12))}, b"\0" * 12, ["overlaps"]),
        ({"t": spec(offsets=(4, 12))}, b"\0" * 12, ["4 bytes unused"]),
        ({"t": spec()}, b"\0" * 7, ["truncated"]),
        ({"t": spec()}, b"\0" * 9, ["1 bytes after the last tensor"]),
        ({"t": spec(), "__metadata__": {"format": 1}}, b"\0" * 8, ["__metadata__"]),
        ({"\ud800": spec()}, b"\0" * 8, ["not valid Unicode"]),
        ({"a\nb": spec("F33")}, b"\0" * 8, [r"'a\nb'"]),
    ],
)
def test_broken_headers(tmp_path, header, data, words):
    file = raw_file(tmp_path / "x.safetensors", header, data)
    refused(lambda: read_header(file), file, *words)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 17, 16])
def test_absurd_header_lengths(tmp_path, length):
    file = raw_file(tmp_path / "x.safetensors", b'{"__metadata_', length=length)
    refused(lambda: read_header(file), file, length, "truncated")


def test_a_header_longer_than_the_library_takes(tmp_path):
    file = raw_file(tmp_path / "x.safetensors", b"{}", length=100_000_001)
    os.truncate(file, 150_000_000)
    refused(lambda: read_header(file), file, 100_000_001, "at most 100000000")


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "short").write_bytes(b"\1\0\0")
    refused(lambda: read_header(tmp_path / "short"), "3 bytes are no safetensors file")
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(lambda: read_header(tmp_path / "pointer"), "Git LFS pointer", "git lfs pull")
    os.mkfifo(tmp_path / "fifo")
    refused(lambda: read_header(tmp_path / "fifo"), "not a regular file")
    refused(lambda: read_header(tmp_path), "not a regular file")
    refused(lambda: read_header(tmp_path / "none"), "No such file")


HOSTILE = [None, True, -1, 0, 1.5, float("nan"), 2**31, 2**63, 2**64, 10**400, "", "F32", "\0", {}]
HOSTILE += [[], [[]], [0], [0, 0], [2**62] * 3]


def corrupt(good, rng):
    """One safetensors file, damaged once or twice: in its bytes, its length or its JSON."""
    length = struct.unpack("<Q", good[:8])[0]
    header, data = good[8 : 8 + length], good[8 + length :]
    kind = rng.randrange(6)
    if kind == 0:
        broken = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            broken[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
        return bytes(broken)
    if kind == 1:
        return good[: rng.randrange(len(good))]
    if kind == 2:
        at = rng.randrange(len(good))
        return good[:at] + rng.randbytes(rng.randint(1, 9)) + good[at + rng.choice([0, 1, 8]) :]
    if kind == 3:
        wrong = rng.choice([0, 1, length - 1, length + 1, length + len(data), rng.getrandbits(64), rng.getrandbits(20)])
        return struct.pack("<Q", wrong) + header + data
    if kind == 4:  # harmless: other data, other order
        value = json.loads(header)
        text = json.dumps({name: value[name] for name in rng.sample(list(value), len(value))}).encode()
        return struct.pack("<Q", len(text)) + text + rng.randbytes(len(data))
    value = json.loads(header)
    part = value[rng.choice(list(value))]
    part[rng.choice(list(part))] = rng.choice(HOSTILE)
    if rng.random() < 0.2:
        value[rng.choice(list(value))] = rng.choice(HOSTILE)
    text = json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + data


def or_refused(call, where):
    """What `call` returns, or None where it raises NestlingError with one line that names `where`."""
    try:
        return call()
    except NestlingError as error:
        message = str(error)
    assert str(where) in message
    assert "\n" not in message
    return None


def test_fuzzed_files_are_refused_or_read_as_the_library_reads_them(tmp_path):
    rng = random.Random(0)
    tensors = {"w": np.ones((2, 3), np.float32), "b": np.arange(5, dtype=np.int8), "s": np.array(1.5)}
    good = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    file = tmp_path / "x.safetensors"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1000):
        broken = corrupt(good, rng)
        file.write_bytes(broken)
        ours = or_refused(lambda: {entry.name: read_tensor(entry) for entry in read_header(file)}, file)
        outcomes["refused" if ours is None else "read"] += 1
        assert as_bytes(ours) == library_reads(broken), broken
    assert min(outcomes.values()) >= 100, outcomes


def as_bytes(tensors):
    return tensors and {name: (list(tensor.shape), tensor.tobytes()) for name, tensor in tensors.items()}


def library_reads(data):
    try:
        return {name: (list(tensor["shape"]), bytes(tensor["data"])) for name, tensor in safetensors.deserialize(data)}
    except safetensors.SafetensorError:
        return None


def test_directories_that_are_no_model(tmp_path):
    refused(lambda: read_checkpoint(tmp_path / "none"), tmp_path / "none", "no such directory")
    refused(lambda: read_checkpoint("nvidia/model\0"), "cannot be read")
    (tmp_path / "file").write_text("x")
    refused(lambda: read_checkpoint(tmp_path / "file"), "not a directory")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(lambda: read_checkpoint(tmp_path / "loop"), "symbolic links")
    bare = tmp_path / "bare"
    bare.mkdir()
    refused(lambda: read_checkpoint(bare), bare, "no config.json")
    (bare / "config.json").write_text('{\n"a": }')
    refused(lambda: read_checkpoint(bare), bare / "config.json", "line 2")
    (bare / "config.json").write_text("[]")
    refused(lambda: read_checkpoint(bare), "must hold a JSON object, holds a list")
    (bare / "config.json").write_text("{}")
    refused(lambda: read_checkpoint(bare), "no weights")
    (bare / FIRST).touch()
    refused(lambda: read_checkpoint(bare), FIRST, "restore the index")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).touch()
    refused(lambda: read_checkpoint(tmp_path), name, "only safetensors and JSON are read", "safe_serialization=True")


def test_pickles_beside_safetensors_do_not_matter(tmp_path):
    model(tmp_path / "m", {"a": np.zeros(2)})
    (tmp_path / "m" / "pytorch_model.bin").touch()
    assert set(read_checkpoint(tmp_path / "m").entries) == {"a"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_link_loops_and_fifos_in_a_model(tmp_path, name):
    file = model(tmp_path / "m", {"a": np.zeros(2)}) / name
    file.unlink()
    file.symlink_to(name)
    refused(lambda: read_checkpoint(tmp_path / "m"), file, "symbolic links")
    file.unlink()
    file.symlink_to("gone")
    refused(lambda: read_checkpoint(tmp_path / "m"), file, "No such file")
    file.unlink()
    os.mkfifo(file)
    refused(lambda: read_checkpoint(tmp_path / "m"), file, "not a regular file")


@pytest.mark.parametrize(
    "shard",
    [
        *("/etc/x.safetensors", "../x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "C:x.safetensors"),
        *("", ".", "..", "config.json", "x.bin", "a\0.safetensors", "a\n.safetensors", "\ud800.safetensors"),
        *(None, 3, ["x.safetensors"]),
    ],
)
def test_index_names_only_weights_beside_it(tmp_path, shard):
    sharded(tmp_path / "m", SHARDS, {"a": FIRST, "b": shard})
    refused(lambda: read_checkpoint(tmp_path / "m"), INDEX, "'b'", "same directory")


def test_index_and_shards_must_agree(tmp_path):
    def read(shards, weight_map):
        return lambda: read_checkpoint(sharded(tmp_path / "m", shards, weight_map))

    both = {"a": FIRST, "b": SECOND}
    refused(read(SHARDS, both | {"c": FIRST}), INDEX, "'c' is not in " + FIRST)
    refused(read(SHARDS, {"a": SECOND, "b": FIRST}), INDEX, "'a' is not in " + SECOND)
    refused(read(SHARDS, both | {"c": "x.safetensors"}), INDEX, "x.safetensors", "missing")
    twice = {FIRST: SHARDS[FIRST], SECOND: SHARDS[FIRST] | SHARDS[SECOND]}
    refused(read(twice, both), "'a' is in two files", FIRST, SECOND)
    refused(read(SHARDS, {}), INDEX, "weight_map")
    refused(read(SHARDS, []), INDEX, "weight_map")
    (tmp_path / "m" / INDEX).write_text('{"weight_map": {')
    refused(lambda: read_checkpoint(tmp_path / "m"), INDEX, "broken JSON")
    (tmp_path / "m" / INDEX).write_bytes(b"\xff\xfe")
    refused(lambda: read_checkpoint(tmp_path / "m"), INDEX, "cannot be read")
    (tmp_path / "m" / INDEX).write_text("[" * 100_000)
    refused(lambda: read_checkpoint(tmp_path / "m"), INDEX, "broken JSON")


def test_fuzzed_indexes(tmp_path):
    rng = random.Random(1)
    path = sharded(tmp_path / "m", SHARDS)
    good = (path / INDEX).read_bytes()
    for _ in range(300):
        broken = bytearray(good)
        for _ in range(rng.randint(1, 2)):
            broken[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        (path / INDEX).write_bytes(broken)
        read = or_refused(lambda: read_checkpoint(path), path)
        assert read is None or set(read.entries) == {"a", "b"}


def plan(tensors):
    """Planned tensors and a producer that yields each in small pieces, from torch tensors."""
    codes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3"}
    planned = [Planned(name, codes[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]

    def produce(name):
        data = bytes(tensors[name].contiguous().flatten().view(torch.uint8).tolist()) if tensors[name].numel() else b""
        for at in range(0, len(data), 10):
            yield data[at : at + 10]

    return planned, produce


def example_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "flags": torch.tensor([True, False, True]),
        "norm.weight": torch.randn(3, generator=generator).bfloat16(),
        "bias": torch.randn(5, generator=generator),
        "scale": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "eight": torch.randn(3, 3, generator=generator).to(torch.float8_e4m3fn),
        "Ünïcode": torch.randn(9, 7, generator=generator).bfloat16(),
    }


def assert_same(ours, tensors):
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert ours[name].flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist()


def test_one_file_is_read_back_by_the_library(tmp_path):
    tensors = example_tensors()
    digests = write_weights(tmp_path, *plan(tensors))
    file = tmp_path / "model.safetensors"
    assert digests == {"model.safetensors": xxhash.xxh3_128_hexdigest(file.read_bytes())}
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert_same(safetensors.torch.load_file(file), tensors)
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    for entry in read_header(file):
        assert entry.start % entry.itemsize == 0
    assert next(entry.start for entry in read_header(file)) % 8 == 0


@pytest.mark.parametrize("shard_bytes", [1, 30, 60, 130])
def test_shards_are_read_back_by_the_library(tmp_path, shard_bytes):
    tensors = example_tensors()
    digests = write_weights(tmp_path, *plan(tensors), shard_bytes=shard_bytes)
    assert digests == {file.name: xxhash.xxh3_128_hexdigest(file.read_bytes()) for file in tmp_path.iterdir()}
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert list(index["weight_map"].values()) == sorted(index["weight_map"].values())
    loaded = {}
    for shard in set(index["weight_map"].values()):
        part = safetensors.torch.load_file(tmp_path / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == part.keys()
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= shard_bytes
        loaded |= part
    assert_same(loaded, tensors)
    (tmp_path / "config.json").write_text("{}")
    assert read_checkpoint(tmp_path).entries.keys() == tensors.keys()


def test_gather_to_write_and_back(tmp_path):
    values = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)
    source = model(tmp_path / "a", {"w": values, "v": np.arange(7.0)})
    read = read_checkpoint(source)
    keep = {"w": [np.arange(0, 40, 3)[::-1], np.arange(11)], "v": [np.array([6, 0])]}
    planned = [Planned("w", "F32", (14, 11)), Planned("v", "F64", (2,))]
    (tmp_path / "b").mkdir()
    write_weights(tmp_path / "b", planned, lambda name: gather(read.entries[name], keep[name], 100))
    loaded = safetensors.numpy.load_file(tmp_path / "b" / "model.safetensors")
    np.testing.assert_array_equal(loaded["w"], values[39::-3, :11])
    np.testing.assert_array_equal(loaded["v"], [6.0, 0.0])


def test_any_contiguous_buffer_may_be_produced(tmp_path):
    pieces = [np.zeros((2, 2), "V2"), np.ones((1, 2), np.float16), b"\1\2", bytearray(2)]
    pieces += [b"", memoryview(b""), np.zeros((0, 3))]
    write_weights(tmp_path, [Planned("t", "BF16", (8,))], lambda name: pieces)
    (entry,) = read_header(tmp_path / "model.safetensors")
    assert read_tensor(entry).tobytes() == bytes(8) + np.ones(2, np.float16).tobytes() + b"\1\2\0\0"


def test_a_slow_disk_is_waited_for(tmp_path, monkeypatch):
    """A model is never in memory because it is made faster than it is written: one piece is written, one waits."""
    made, written, write = [], [], WeightsWriter.write

    def slow(writer, name, data):
        time.sleep(0.005)
        write(writer, name, data)
        written.append(name)

    def produce(name):
        for number in range(20):
            made.append(number)
            assert len(made) <= len(written) + 2
            yield b"0123456789"

    monkeypatch.setattr(WeightsWriter, "write", slow)
    write_weights(tmp_path, [Planned("t", "U8", (200,))], produce)
    assert len(written) == 20


def test_a_write_that_takes_only_a_part_goes_on(tmp_path):
    whole = os.pwrite
    with mock.patch.object(os, "pwrite", lambda file, view, at: whole(file, view[:3], at)):
        write_weights(tmp_path, [Planned("t", "U8", (10,))], lambda name: [b"0123456789"])
    (entry,) = read_header(tmp_path / "model.safetensors")
    assert read_tensor(entry).tobytes() == b"0123456789"


@pytest.mark.parametrize("shard_bytes", [10, 10**9])
def test_pieces_that_have_their_places_are_written_in_any_order(tmp_path, shard_bytes):
    """Each file is hashed in order, and closed as soon as it is whole."""
    data = {name: os.urandom(10) for name in "abc"}
    planned = [Planned(name, "U8", (10,)) for name in data]
    opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with WeightsWriter(tmp_path, planned, shard_bytes) as writer:
        places = [writer.place(name, part) for name in data for part in (data[name][:4], data[name][4:])]
        for write in random.Random(0).sample(places, len(places)):
            write()
        if opened is not None:
            assert len(os.listdir("/proc/self/fd")) == opened
    files = sorted(tmp_path.iterdir())
    assert writer.digests == {file.name: xxhash.xxh3_128_hexdigest(file.read_bytes()) for file in files}
    entries = [entry for file in files if file.suffix == ".safetensors" for entry in read_header(file)]
    assert {entry.name: read_tensor(entry).tobytes() for entry in entries} == data


def test_what_is_produced_must_be_as_planned(tmp_path):
    def write(folder, data, *planned):
        (tmp_path / folder).mkdir(exist_ok=True)
        return lambda: write_weights(tmp_path / folder, planned, lambda name: [data])

    pair, byte = Planned("t", "F32", (2,)), Planned("t", "U8", (1,))
    refused(write("short", b"\0" * 7, pair), "'t': 7 bytes were produced, 8 were planned")
    refused(write("long", b"\0" * 9, pair), "'t': 9 bytes were produced, 8 were planned")
    (tmp_path / "more").mkdir()
    more = partial(write_weights, tmp_path / "more", [byte], lambda name: [b"\0"] * 2)
    refused(more, "'t': 2 bytes were produced, 1 were planned")
    refused(write("type", b"", Planned("t", "BF61", ())), "'BF61'", "did you mean 'BF16'")
    refused(write("twice", b"\0", byte, byte), "'t' would be written twice")
    write("there", b"\0", byte)()
    refused(write("there", b"\0", byte), "model.safetensors", "File exists")


def test_a_full_disk_is_one_line(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    planned = [Planned("t", "U8", (100_000,))]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        refused(lambda: write_weights(tmp_path, planned, lambda name: [bytes(1000)] * 100), tmp_path, "too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_values_are_frozen_and_compare(tmp_path):
    entry = read_header(model(tmp_path / "m", {"a": np.zeros((2, 3))}) / "model.safetensors")[0]
    assert entry == copy.copy(entry)
    assert len({entry, copy.copy(entry)}) == 1
    with pytest.raises(AttributeError):
        entry.start = 0
