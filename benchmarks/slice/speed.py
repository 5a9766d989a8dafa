"""How fast is a slice against `cp` of the bytes it writes? Makes its own bf16 checkpoint, of any published shape.

    python benchmarks/slice/speed.py --work DIR                             # 4 GB, three rounds
    python benchmarks/slice/speed.py --work DIR --shape nemotron-nano-12b-v2 --rounds 1    # 24.6 GB

Each round times, in turn, `nestling slice` and `cp -r --reflink=never` of the files it wrote. *warm*: the source is in
memory, and each command runs once untimed just before, so that both find the same free pages. *cold*: the caches of the
system are dropped before each command (needs root), so that both read from the disk. Ratios are medians of the rounds'.
Peak memory is the largest resident set of the slicing process. Start-up is the whole command on a tiny checkpoint.
"""

import argparse
import os
import platform
import shutil
import statistics
from pathlib import Path

import numpy as np

from nestling.arch.presets import PRESETS
from nestling.bench.slice import CASES, LARGE, TINY, WIDTHS, make, measure, nestling, specs, timed

MORE = {
    "7/8 and 3/4 in one pass": ("--budget", "88%", "--budget", "75%"),
    "75 % of every width, to fp16": ("--submodel", WIDTHS, "--dtype", "fp16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a directory on the disk to measure; it is emptied")
    parser.add_argument("--shape", choices=[*PRESETS], help="a published shape instead of the 4 GB one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", type=int, default=4, help="how many of the cases, from the first")
    parser.add_argument(
        "--reserve",
        type=int,
        default=0,
        help="GiB to hold and free while a command runs, for a virtual machine that hands free pages back to its host",
    )
    given = parser.parse_args()
    work = given.work / "nestling-slice-speed"
    shutil.rmtree(work, ignore_errors=True)
    architecture = PRESETS[given.shape] if given.shape else LARGE
    make(architecture, work / "source")
    make(TINY, work / "tiny")
    specs(architecture, work)
    size = sum(file.stat().st_size for file in (work / "source").iterdir())
    versions = f"{platform.python_version()} on {os.cpu_count()} cores; numpy {np.__version__}"
    print(f"source: {size / 1e9:.2f} GB; {versions}; reserve {given.reserve} GiB")
    starts = []
    for _ in range(5):
        shutil.rmtree(work / "out", ignore_errors=True)
        starts.append(timed(nestling("slice", work / "tiny", "--budget", "100%", "--out", work / "out"))[0])
    print(f"start-up, work and end on {TINY.hidden_size} channels: median {statistics.median(starts):.2f} s of 5")
    print("| cut | caches | written | slice | cp | ratio | peak memory |")
    print("|---|---|---:|---:|---:|---:|---:|", flush=True)
    states = [True] if given.shape else [False, *([True] if os.geteuid() == 0 else [])]
    for name, words in [*CASES.items(), *MORE.items()][: given.cases]:
        for cold in states:
            written, figures = measure(work, words, given.rounds, cold, given.reserve)
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
