"""A cut of a checkpoint on the disk against `cp` of the files that it wrote, whole commands in turns, with memory.

A round times, in turn, `nestling slice` and `cp -r --reflink=never` of what it wrote. *warm*: the source is in memory,
and each command runs once untimed just before, so that both find the same free pages. *cold*: the caches of the system
are dropped before each command (needs root), so that both read from the disk. Memory is the largest resident set of the
slicing process. Cuts of 4 and 24.6 GB, also cold: benchmarks/slice.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from nestling.arch.architecture import Architecture
from nestling.arch.presets import PRESETS
from nestling.arch.submodel import tensors
from nestling.bench.figure import Figure
from nestling.bench.turns import Bench
from nestling.errors import NestlingError
from nestling.weights.files import write_json
from nestling.weights.writing import Planned, write_weights

LARGE = replace(
    PRESETS["nemotron-nano-12b-v2"],
    hidden_size=2560,
    intermediate_size=8192,
    mamba_num_heads=64,
    num_attention_heads=24,
    vocab_size=65536,
)
"""4 GB and more."""
SOME = replace(
    LARGE,
    hybrid_override_pattern="M-M*-M-",
    hidden_size=1536,
    intermediate_size=6144,
    mamba_num_heads=32,
    vocab_size=16384,
)
TINY = replace(LARGE, hidden_size=64, intermediate_size=64, mamba_head_dim=8, head_dim=8, vocab_size=64)
WIDTHS, DEPTH = "three-quarters.json", "shallow.json"
CASES = {
    "75 % of every width": ("--submodel", WIDTHS),
    "the last quarter of the layers dropped": ("--submodel", DEPTH),
}
BLOCK = 64 << 20
ALONE = """
import os, sys, time
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
began = time.monotonic()
_, status, usage = os.wait4(os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet), 0)
print(time.monotonic() - began, usage.ru_maxrss, status)
"""
"""Started by a process that is small itself: the system counts what a parent held as its child's peak."""
RESERVE = """
import mmap, sys, time
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
parts = [mmap.mmap(-1, 1 << 28, flags=flags) for _ in range(int(sys.argv[1]))]
for part in parts:
    part.madvise(mmap.MADV_HUGEPAGE)  # freed in no time: what is measured beside it needs every core
    for at in range(0, len(part), mmap.PAGESIZE):
        part[at] = 1
print(flush=True)
sys.stdin.readline()
for part in parts:
    part.close()
    time.sleep(0.1)
"""


def figures(bench: Bench) -> Iterator[Figure]:
    architecture = TINY if bench.quick else SOME
    cases = list(CASES.items())[: 1 if bench.quick else None]
    with tempfile.TemporaryDirectory(prefix="nestling-slice-") as directory:
        work = Path(directory)
        make(architecture, work / "source")
        specs(architecture, work)
        for name, words in cases:
            _check(work, words)
            for state in ("warm", "cold")[: 2 if os.geteuid() == 0 and not bench.quick else 1]:
                yield from _case(bench, f"{name}, {state}", work, words, cold=state == "cold")


def _case(bench: Bench, name: str, work: Path, words: Sequence[str], cold: bool) -> Iterator[Figure]:
    written, found = measure(work, words, bench.rounds, cold)
    ratios = tuple(ours / theirs for ours, theirs in zip(found["slice"], found["cp"], strict=True))
    seconds = statistics.median(found["slice"])
    case = f"{name}, {written / 1e6:.0f} MB written"
    yield Figure("slice", case, "cp --reflink=never", "× the time", ratios, 1.3, seconds)
    yield Figure("slice", f"{name}, resident", "none", "GiB", tuple(found["memory"]), 0.5)


def make(architecture: Architecture, directory: Path) -> None:
    """A checkpoint of bf16 values as weights have, marked as ranked so that sizes can be wished for."""
    directory.mkdir(parents=True)
    values = np.random.default_rng(0).standard_normal(BLOCK // 2 + 1, dtype=np.float32) * np.float32(0.02)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    planned = [Planned(tensor.name, "BF16", tensor.shape) for tensor in tensors(architecture)]
    sizes = {tensor.name: tensor.nbytes for tensor in planned}

    def produce(name: str) -> Iterator[np.ndarray]:
        for at in range(0, sizes[name], BLOCK):
            yield bits[: min(BLOCK, sizes[name] - at) // 2]

    write_weights(directory, planned, produce)
    write_json(directory / "config.json", architecture.to_config({"dtype": "bfloat16"}))
    write_json(directory / "nestling.json", {"format": 1, "budgets": {"100%": {"submodel": {}}}})


def specs(architecture: Architecture, directory: Path) -> None:
    """The sizes that cases name."""
    a = architecture
    widths = {field: getattr(a, field) * 3 // 4 for field in ("hidden_size", "intermediate_size", "mamba_num_heads")}
    write_json(directory / WIDTHS, widths)
    write_json(directory / DEPTH, {"layers": list(range(len(a.hybrid_override_pattern) * 3 // 4))})


def nestling(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "nestling", *arguments]


def slicing(work: Path, words: Sequence[str]) -> list[object]:
    """The command of a case."""
    named = [str(work / word) if word.endswith(".json") else word for word in words]
    name = "{budget}" if "--budget" in words else "cut"
    return nestling("slice", work / "source", *named, "--out", work / "out" / name)


def measure(
    work: Path, words: Sequence[str], rounds: int, cold: bool, reserve: int = 0
) -> tuple[int, Mapping[str, list[float]]]:
    """Written bytes, and per round the seconds of both and the GiB of the slicing process. reserve: see `timed`."""
    out, copy = work / "out", work / "copy"
    commands: dict[str, tuple[list[object], Path]] = {
        "slice": (slicing(work, words), out),
        "cp": (["cp", "-r", "--reflink=never", out, copy], copy),
    }
    found: dict[str, list[float]] = {"slice": [], "memory": [], "cp": []}
    for _ in range(rounds):
        for name, (command, target) in commands.items():
            _prepare(command, target, cold)
            seconds, memory = timed(command, reserve)
            found[name].append(seconds)
            if name == "slice":
                found["memory"].append(memory)
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    shutil.rmtree(out)
    shutil.rmtree(copy)
    return written, found


def timed(command: Sequence[object], reserve: int = 0) -> tuple[float, float]:
    """Seconds and peak resident GiB of one command.

    reserve: GiB that another process holds and frees while the command runs, 2.5 a second. A virtual machine may hand
    pages that are free for long back to its host; getting them again takes several times as long as writing to them.
    """
    words = [str(word) for word in command]
    with _reserved(4 * reserve):
        done = subprocess.run([sys.executable, "-I", "-S", "-c", ALONE, *words], capture_output=True, text=True)
    seconds, kilobytes, status = done.stdout.split()
    if status != "0":
        raise NestlingError(f"bench slice: {' '.join(words)} failed: {done.stderr.strip()[-500:]}")
    return float(seconds), int(kilobytes) / 2**20


@contextmanager
def _reserved(parts: int) -> Iterator[None]:
    if not parts:
        yield
        return
    holder = [sys.executable, "-I", "-S", "-c", RESERVE, str(parts)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        process.stdin.write("\n")
        process.stdin.flush()
        yield


def _prepare(command: Sequence[object], target: Path, cold: bool) -> None:
    """The same start for every command: nothing at its target, nothing left to flush, caches warm or dropped."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return
    timed(command)
    shutil.rmtree(target)  # just before: a virtual machine soon hands free pages back, and new ones are slower


def _check(work: Path, words: Sequence[str]) -> None:
    """Some tensors of the cut are the first rows and columns of those it was made from, bit for bit."""
    timed(slicing(work, words))
    cut, source = next((work / "out").rglob("model.safetensors")), work / "source" / "model.safetensors"
    with safe_open(cut, "pt") as found, safe_open(source, "pt") as given:
        for name in found.keys():  # noqa: SIM118 - a file, no mapping
            if name.endswith(("norm.weight", "up_proj.weight", "down_proj.weight", "embeddings.weight")):
                mine, whole = found.get_tensor(name), given.get_tensor(name)
                if "mixer.norm" not in name and not torch.equal(mine, whole[tuple(map(slice, mine.shape))]):
                    raise NestlingError(f"bench slice: {name} is no prefix of what it was cut from; nothing was timed")
    shutil.rmtree(work / "out")
