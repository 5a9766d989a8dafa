"""How fast is a slice against `cp` of the bytes it writes? Makes its own bf16 checkpoint, of any published shape.

    python benchmarks/slice/speed.py --work DIR                             # 4 GB, three rounds
    python benchmarks/slice/speed.py --work DIR --shape nemotron-nano-12b-v2 --rounds 1    # 24.6 GB

Each round times, in turn, `nestling slice` and `cp -r --reflink=never` of the files it wrote. *warm*: the source is in
memory, and each command has just run once untimed, so that both find the same free pages. *cold*: the caches of the
system are dropped before each command (needs root), so that both read from the disk. Ratios are medians of the rounds'.
Peak memory is the largest resident set of the slicing process. Start-up is the whole command on a tiny checkpoint.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from nestling.arch.architecture import Architecture
from nestling.arch.presets import PRESETS
from nestling.arch.submodel import tensors
from nestling.weights.files import write_json
from nestling.weights.writing import Planned, write_weights

FOUR_GB = replace(
    PRESETS["nemotron-nano-12b-v2"],
    hidden_size=2560,
    intermediate_size=8192,
    mamba_num_heads=64,
    num_attention_heads=24,
    vocab_size=65536,
)
TINY = replace(FOUR_GB, hidden_size=64, intermediate_size=64, mamba_head_dim=8, head_dim=8, vocab_size=64)
CASES = {
    "75 % of every width": ["--submodel", "three-quarters.json"],
    "the last quarter of the layers dropped": ["--submodel", "shallow.json"],
    "7/8 and 3/4 in one pass": ["--budget", "88%", "--budget", "75%"],
    "75 % of every width, to fp16": ["--submodel", "three-quarters.json", "--dtype", "fp16"],
}
BLOCK = 64 << 20


def make(architecture: Architecture, directory: Path) -> None:
    """A checkpoint of random finite bf16 values, marked as ranked so that sizes can be wished for."""
    directory.mkdir(parents=True)
    draw = np.random.default_rng(0).integers(0, 1 << 16, BLOCK // 2 + 1, dtype=np.uint16)
    bits = (draw & 0x87FF) | 0x3800  # either sign, from 2^-15 to below 2
    planned = [Planned(tensor.name, "BF16", tensor.shape) for tensor in tensors(architecture)]
    sizes = {tensor.name: tensor.nbytes for tensor in planned}

    def produce(name: str) -> Iterator[np.ndarray]:
        for at in range(0, sizes[name], BLOCK):
            yield bits[: min(BLOCK, sizes[name] - at) // 2]

    write_weights(directory, planned, produce)
    write_json(directory / "config.json", architecture.to_config({"dtype": "bfloat16"}))
    write_json(directory / "nestling.json", {"format": 1, "budgets": {"100%": {"submodel": {}}}})


def specs(architecture: Architecture, directory: Path) -> None:
    a = architecture
    write_json(
        directory / "three-quarters.json",
        {
            "hidden_size": a.hidden_size * 3 // 4,
            "intermediate_size": a.intermediate_size * 3 // 4,
            "mamba_num_heads": a.mamba_num_heads * 3 // 4,
        },
    )
    write_json(directory / "shallow.json", {"layers": list(range(len(a.hybrid_override_pattern) * 3 // 4))})


def timed(command: Iterable[object]) -> tuple[float, float]:
    """Seconds and peak resident GiB of one command."""
    began = time.monotonic()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return time.monotonic() - began, usage.ru_maxrss / 2**20


def nestling(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "nestling", *arguments]


def measure(work: Path, words: list[str], rounds: int, cold: bool) -> tuple[float, dict[str, list[float]]]:
    """Written bytes, and per figure one value per round."""
    names = [str(work / word) if word.endswith(".json") else word for word in words]
    out, copy = work / "out", work / "copy"
    commands = {
        "slice": (nestling("slice", work / "source", *names, "--out", out / "{budget}"), out),
        "cp": (["cp", "-r", "--reflink=never", out, copy], copy),
    }
    figures: dict[str, list[float]] = {"slice": [], "memory": [], "cp": []}
    for _ in range(rounds):
        for name, (command, target) in commands.items():
            prepare(command, target, cold)
            seconds, memory = timed(command)
            figures[name].append(seconds)
            if name == "slice":
                figures["memory"].append(memory)
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    shutil.rmtree(out)
    shutil.rmtree(copy)
    return written, figures


def prepare(command: list[object], target: Path, cold: bool) -> None:
    """The same start for every command: nothing at its target, nothing left to flush, caches warm or dropped."""
    shutil.rmtree(target, ignore_errors=True)
    if not cold:
        timed(command)
        shutil.rmtree(target)
    subprocess.run(["sync"], check=True)
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a directory on the disk to measure; it is emptied")
    parser.add_argument("--shape", choices=[*PRESETS], help="a published shape instead of the 4 GB one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of the cases, from the first")
    given = parser.parse_args()
    work = given.work / "nestling-slice-speed"
    shutil.rmtree(work, ignore_errors=True)
    architecture = PRESETS[given.shape] if given.shape else FOUR_GB
    make(architecture, work / "source")
    make(TINY, work / "tiny")
    specs(architecture, work)
    size = sum(file.stat().st_size for file in (work / "source").iterdir())
    print(f"source: {size / 1e9:.2f} GB; {platform.python_version()} on {os.cpu_count()} cores; numpy {np.__version__}")
    starts = []
    for _ in range(5):
        shutil.rmtree(work / "out", ignore_errors=True)
        starts.append(timed(nestling("slice", work / "tiny", "--budget", "100%", "--out", work / "out"))[0])
    print(f"start-up, work and end on {TINY.hidden_size} channels: median {statistics.median(starts):.2f} s of 5")
    print("| cut | caches | written | slice | cp | ratio | peak memory |")
    print("|---|---|---:|---:|---:|---:|---:|", flush=True)
    states = [True] if given.shape else [False, *([True] if os.geteuid() == 0 else [])]
    for name, words in list(CASES.items())[: given.cases]:
        for cold in states:
            written, figures = measure(work, words, given.rounds, cold)
            middle = {key: statistics.median(values) for key, values in figures.items()}
            ratio = statistics.median(s / c for s, c in zip(figures["slice"], figures["cp"], strict=True))
            print(
                f"| {name} | {'cold' if cold else 'warm'} | {written / 1e9:.2f} GB | "
                f"{middle['slice']:.2f} s | {middle['cp']:.2f} s | {ratio:.2f} | {max(figures['memory']):.2f} GiB |",
                flush=True,
            )
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
