"""Resident memory of a whole family against its largest size alone, and against separate models.

    OMP_NUM_THREADS=2 python benchmarks/serving/memory.py

Writes a random family of at least 2 GB (float32, about 580 million parameters) into a temporary directory, then starts
one process per question, each of which memory-maps the checkpoint and runs a prompt and a few tokens: of the largest
size alone, and of all sizes in turn with every view kept. Resident memory is the process's own, after that. The rival
figure is the sum of the bytes of separate models. Bytes of weights are of distinct storages.
"""

import argparse
import json
import subprocess
import sys
import tempfile
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

SHAPE = Architecture(
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
SIZES = {
    "100%": Submodel(),
    "75%": Submodel(hidden_size=896, intermediate_size=4096, mamba_num_heads=24),
    "50%": Submodel(
        hidden_size=704, intermediate_size=3072, mamba_num_heads=24, mamba_head_dim=48, num_attention_heads=12
    ),
}
PROMPT, TOKENS = list(range(1, 33)), 4


def save(directory: Path) -> None:
    model = NemotronH(SHAPE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.02, generator=generator).add_(1.0 if "norm" in name else 0.0)
    save_model(model, directory)
    (directory / "config.json").write_text(json.dumps(SHAPE.to_config({})))
    budgets = {name: {"submodel": submodel.to_json()} for name, submodel in SIZES.items()}
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


def ask(directory: Path, sizes: list[str]) -> None:
    """The child: prints its resident bytes after it has run these sizes."""
    family = nestling.load(directory)
    views = [family[size].held() for size in sizes]
    for view in views:
        generate(view, [PROMPT], max_tokens=TOKENS)
    stored = storage_bytes(family) if len(sizes) > 1 else sum(p.nbytes for p in family.model.parameters())
    print(json.dumps({"resident": resident(), "storages": stored}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ask", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        ask(Path(options.ask[0]), options.ask[1:])
        return
    with tempfile.TemporaryDirectory() as made:
        save(Path(made))
        found = {}
        for title, sizes in {"largest alone": ["100%"], "all sizes": list(SIZES)}.items():
            command = [sys.executable, __file__, "--ask", made, *sizes]
            found[title] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    separate = 4 * sum(parameters(SHAPE, submodel) for submodel in SIZES.values())
    largest, family = found["largest alone"], found["all sizes"]
    print(f"torch {torch.__version__}, float32, {', '.join(SIZES)}; {TOKENS} tokens of each after {len(PROMPT)}\n")
    print("| | weights, bytes of distinct storages | resident memory |\n|---|---:|---:|")
    for title, one in found.items():
        print(f"| {title} | {one['storages']:,} | {one['resident']:,} |")
    shares = (family[key] / largest[key] for key in ("storages", "resident"))
    print(f"| of the largest alone | {' | '.join(f'{share:.4f}' for share in shares)} |")
    print(f"| separate models, bytes of their weights | {separate:,} ({separate / largest['storages']:.2f}) | |")


if __name__ == "__main__":
    main()
