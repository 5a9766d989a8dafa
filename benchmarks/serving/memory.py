"""Resident memory of a whole family against its largest size alone, and against separate models.

    OMP_NUM_THREADS=2 python benchmarks/serving/memory.py            # 63 layers
    OMP_NUM_THREADS=2 python benchmarks/serving/memory.py --shallow  # 14 layers of twice the width

Writes a random family of at least 2 GB (float32) into a temporary directory, then starts
one process per question, each of which memory-maps the checkpoint and runs a prompt and a few tokens: of the largest
size alone, and of all sizes in turn with every view kept. Resident memory is the process's own, after that. The rival
figure is the sum of the bytes of separate models. Bytes of weights are of distinct storages.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import nestling
from nestling.arch.architecture import Architecture
from nestling.arch.cost import parameters
from nestling.arch.submodel import Submodel
from nestling.infer.family import Family
from nestling.infer.generate import generate
from nestling.model.nemotron_h import NemotronH
from nestling.model.store import save_model

DEEP = Architecture(
    "M-M-M-M-*" * 7,
    vocab_size=16384,
    hidden_size=1024,
    intermediate_size=5120,
    n_groups=8,
    mamba_num_heads=32,
    mamba_head_dim=64,
    ssm_state_size=128,
    num_key_value_heads=4,
    num_attention_heads=16,
    head_dim=64,
)
SHALLOW = replace(
    DEEP,
    hybrid_override_pattern="M-M-M-*" * 2,
    hidden_size=2048,
    intermediate_size=10240,
    mamba_num_heads=64,
    num_attention_heads=32,
)
PROMPT, TOKENS = list(range(1, 33)), 4


def sizes(shape: Architecture) -> dict[str, Submodel]:
    """Three sizes, the smallest with every width cut."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    mamba, attention = shape.mamba_num_heads, shape.num_attention_heads
    half = Submodel(None, hidden * 11 // 16, inner * 3 // 5, mamba * 3 // 4, 48, attention * 3 // 4)
    three = Submodel(hidden_size=hidden * 7 // 8, intermediate_size=inner * 4 // 5, mamba_num_heads=mamba * 3 // 4)
    return {"100%": Submodel(), "75%": three, "50%": half}


def save(directory: Path, shape: Architecture) -> None:
    model = NemotronH(shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.02, generator=generator).add_(1.0 if "norm" in name else 0.0)
    save_model(model, directory)
    (directory / "config.json").write_text(json.dumps(shape.to_config({})))
    budgets = {name: {"submodel": submodel.to_json()} for name, submodel in sizes(shape).items()}
    (directory / "nestling.json").write_text(json.dumps({"format": 1, "budgets": budgets}))


def resident() -> int:
    """Bytes of this process in memory, the mapped weights included."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))


def storage_bytes(family: Family) -> int:
    """Bytes of distinct storages behind the views of all sizes."""
    storages = {}
    for view in family.values():
        widths = view.held().widths
        held = [tensor for width in (widths.ends, *(w for _, w in widths.layers)) for tensor in width.held.values()]
        for tensor in [*held, *view.model.parameters()]:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def ask(directory: Path, names: list[str]) -> None:
    """The child: prints its resident bytes after it has run these sizes."""
    family = nestling.load(directory)
    views = [family[name].held() for name in names]
    for view in views:
        generate(view, [PROMPT], max_tokens=TOKENS)
    stored = storage_bytes(family) if len(names) > 1 else sum(p.nbytes for p in family.model.parameters())
    print(json.dumps({"resident": resident(), "storages": stored}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ask", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--shallow", action="store_true", help="A few wide layers instead of many narrow ones.")
    options = parser.parse_args()
    if options.ask:
        ask(Path(options.ask[0]), options.ask[1:])
        return
    with tempfile.TemporaryDirectory() as made:
        shape = SHALLOW if options.shallow else DEEP
        submodels, found = sizes(shape), {}
        save(Path(made), shape)
        for title, names in {"largest alone": ["100%"], "all sizes": list(submodels)}.items():
            command = [sys.executable, __file__, "--ask", made, *names]
            found[title] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    separate = 4 * sum(parameters(shape, submodel) for submodel in submodels.values())
    largest, family = found["largest alone"], found["all sizes"]
    layers = len(shape.hybrid_override_pattern)
    print(f"torch {torch.__version__}, float32, {parameters(shape):,} parameters in {layers} layers")
    print(f"{', '.join(submodels)}; {TOKENS} tokens of each after {len(PROMPT)}\n")
    print("| | weights, bytes of distinct storages | resident memory |\n|---|---:|---:|")
    for title, one in found.items():
        print(f"| {title} | {one['storages']:,} | {one['resident']:,} |")
    shares = (family[key] / largest[key] for key in ("storages", "resident"))
    print(f"| of the largest alone | {' | '.join(f'{share:.4f}' for share in shares)} |")
    print(f"| separate models, bytes of their weights | {separate:,} ({separate / largest['storages']:.2f}) | |")


if __name__ == "__main__":
    main()
