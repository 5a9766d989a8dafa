"""What the study says on sums, asked again on prose: the temperature of distillation, paired by seed.

    python benchmarks/elastic/text.py --parent out/prose/parent --out out/text-study

Needs the texts of runs/prose/prepare.py and the parent of runs/prose.toml. Every (temperature, seed) is a run of
`nestling run` on a recipe made here, skipped where it is done; the table has the perplexities of held-out chapters.
"""

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import fmean
from typing import Any

PROSE = Path(__file__).parents[2] / "runs" / "prose.toml"
SIZES = ("100%", "75%", "50%")


def recipe(parent: Path, out: Path, temperature: float, steps: int) -> str:
    """runs/prose.toml for a parent that exists, without controls, as TOML."""
    base = tomllib.loads(PROSE.read_text())
    train = {key: value for key, value in base["train"].items() if key not in ("stages", "search_space")}
    train |= {"router_steps": steps // 6, "stages": [{"steps": steps, "batch": 8, "length": 256}]}
    train |= {"search_space": base["train"]["search_space"], "objective": {"temperature": temperature}}
    made = {"title": f"T = {temperature:g}", "out": str(out), "data": base["data"], "parent": {"model": str(parent)}}
    made |= {"rank": {"batches": 2, "batch": 16}, "train": train, "evaluate": {"problems": 20}}
    return "".join(f"{key} = {_toml(value)}\n" for key, value in made.items())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + " }"
    return "[" + ", ".join(map(_toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parent", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 4.0])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=60)
    given = options.parse_args()
    print("| seed | T | " + " | ".join(SIZES) + " |\n|---:|---:|" + "---:|" * len(SIZES))
    found: dict[float, list[list[float]]] = {}
    for seed in given.seeds:
        for temperature in given.temperatures:
            out = given.out / f"{temperature:g}-{seed}"
            out.mkdir(parents=True, exist_ok=True)
            file = out.with_suffix(".toml")
            file.write_text(recipe(given.parent.resolve(), out, temperature, given.steps))
            command = [sys.executable, "-m", "nestling", "run", str(file), "--seed", str(seed)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            rows = {row["name"]: row for row in json.loads((out / "report.json").read_text())["rows"]}
            found.setdefault(temperature, []).append([rows[size]["perplexity"] for size in SIZES])
            figures = " | ".join(f"{value:.2f}" for value in found[temperature][-1])
            print(f"| {seed} | {temperature:g} | {figures} |", flush=True)
    for temperature, values in found.items():
        means = [fmean(each) for each in zip(*values, strict=True)]
        print(f"| mean | {temperature:g} | " + " | ".join(f"{value:.2f}" for value in means) + " |")


if __name__ == "__main__":
    main()
