"""The rows by name, and one run of them."""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from nestling.bench.figure import Figure
from nestling.bench.turns import Bench
from nestling.errors import NestlingError, nearest
from nestling.weights.files import check_writable, write_json

ROWS = {
    "scan": "the chunked scan, forward and backward",
    "step": "a whole training step of a hybrid",
    "budgets": "a student's step at 100, 75 and 50 %",
    "loss": "the distillation loss of a large vocabulary",
    "view": "a prefix view against a contiguous weight",
    "decode": "prefill and decode of sizes by view",
    "large": "decode of a billion parameters in bf16 by view",
    "curve": "time against length, batch and hidden size",
    "slice": "a cut of a checkpoint against cp",
    "startup": "the command line",
    "vllm": "the same against vLLM, with --vllm",
}
"""Each is a module of this package whose `figures` measures it."""

RIVALED = {"scan", "step", "decode", "vllm"}
"""Those whose rival is transformers."""


def run(names: Sequence[str], bench: Bench) -> Iterator[Figure]:
    """The figures of these rows, or of all, as they come."""
    for name in check(names):
        for figure in importlib.import_module(f"nestling.bench.{name}").figures(bench):
            yield replace(figure, reach=None) if bench.quick else figure  # tiny work reaches nothing


def check(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in ROWS:
            raise NestlingError(f"bench {name!r} is no row; {nearest(name, tuple(ROWS))}")
    return list(dict.fromkeys(names)) or list(ROWS)


def show(
    names: Sequence[str],
    quick: bool,
    rounds: int,
    json_file: Path | None,
    save: Path | None,
    device: str = "cpu",
    vllm: Path | None = None,
) -> None:
    """Measure and print line by line; write the files at the end, in whose directories nothing is missing."""
    chosen = check(names or [name for name in ROWS if vllm is not None or name != "vllm"])
    if "vllm" in chosen and (vllm is None or not vllm.is_file() or device != "cpu"):
        raise NestlingError(
            f"bench vllm: --vllm {vllm or 'is missing'}: give the Python of an environment that has vLLM for the CPU, "
            "without --device; `make check-vllm` makes .venv-vllm/bin/python"
        )
    for path in (json_file, save):
        if path is not None:
            check_writable(path)
    if find_spec("transformers") is None and {*chosen} & RIVALED:
        raise NestlingError("bench: the rival is stock transformers: pip install 'nestling[hf]'")
    from nestling.bench.machine import check_device, circumstances, measure
    from nestling.bench.page import HEADER, curves, heading, line, page, to_json

    check_device(device)
    about, limits = circumstances(device), measure(device, quick)
    bench = Bench(device, 1 if quick else rounds, quick, limits, vllm)
    print(heading(about, limits), HEADER, sep="\n", flush=True)
    found = []
    for figure in run(chosen, bench):
        print(line(figure), flush=True)
        found.append(figure)
    print(curves(found))
    if json_file is not None:
        write_json(json_file, to_json(about, limits, found))
    if save is not None:
        options = ["--quick"] if quick else [f"--rounds {rounds}"]
        command = " ".join(
            [
                "nestling bench",
                *names,
                *options,
                *([] if device == "cpu" else [f"--device {device}"]),
                *(["--vllm PYTHON"] if vllm else []),
            ]
        )
        save.write_text(page(command, about, limits, found))
