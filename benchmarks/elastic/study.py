"""What elastic training needs: one default (study.toml), one thing changed at a time, several seeds, paired.

    OMP_NUM_THREADS=1 python benchmarks/elastic/study.py --seeds 0 1 2        # makes what is missing
    python benchmarks/elastic/study.py --table > benchmarks/elastic/DATE-tables.md
    python benchmarks/elastic/study.py --page > benchmarks/elastic/summary.html

Per seed one parent and one ranked checkpoint, made once under --out and the same for all variants (variants.py); per
variant and seed one file in results/: every size on 500 held-out problems every 20 steps, tokens, seconds, settings.
What is there with the same settings is not made again, so the study goes on from the files alone. A parent is the same
again only on the same kind of machine and from the same commit, which the files name: sums in another order end
elsewhere. Runs of another parent than the files' are refused.
"""

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from variants import ROUTER, VARIANTS, Variant

import nestling
from nestling.arch.submodel import Submodel
from nestling.pipeline import Pipeline
from nestling.recipe import Recipe, read_recipe
from nestling.train.checkpoints import checksum
from nestling.weights.files import read_json, write_file_atomically

HERE = Path(__file__).parent
RECIPE = HERE / "study.toml"
RESULTS = HERE / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/elastic"), help="parents and runs under way")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    if given.table or given.page:
        from page import page
        from tables import report

        print(report(results(), given.seeds) if given.table else page(results(), given.seeds))
        return
    for variant in sorted((VARIANTS[name] for name in given.only), key=lambda variant: variant.wave):
        for seed in given.seeds:
            make(variant, seed, given.out / f"seed-{seed}")


def results() -> dict[tuple[str, int], dict[str, Any]]:
    """(variant, seed) -> what was measured with the settings of today."""
    found = {}
    for variant in VARIANTS.values():
        for file in sorted(RESULTS.glob(f"{slug(variant.name)}.*.json")):
            result = read_json(file)
            if result["fingerprint"] == fingerprint(settings(variant, result["seed"])):
                found[variant.name, result["seed"]] = result
    return found


def make(variant: Variant, seed: int, out: Path) -> None:
    """Make one result, unless it is there."""
    asked = settings(variant, seed)
    file = result_file(variant.name, seed)
    if file.exists() and read_json(file)["fingerprint"] == fingerprint(asked):
        return
    from runs import Cell

    cell = Cell(variant, variant.recipe(base(), seed), out)
    parent, held_out = prepared(seed, out)
    state = out / "runs" / slug(variant.name)
    found = {}
    if variant.sizes == "found":
        make(VARIANTS[ROUTER], seed, out)
        family = read_json(result_file(ROUTER, seed))["family"]
        found = {name: Submodel.from_json(size["submodel"]) for name, size in family.items()}
    measured = cell.train(state, fingerprint(asked), held_out, found)
    about = {"variant": variant.name, "seed": seed, "fingerprint": fingerprint(asked), "settings": asked}
    RESULTS.mkdir(exist_ok=True)
    write(file, {**about, "made": made(), "parent": parent, **measured})
    shutil.rmtree(state)


@cache
def prepared(seed: int, out: Path) -> tuple[dict[str, Any], Any]:
    """The seed's parent and ranked checkpoint; what the parent scores, and the problems it was measured on."""
    from runs import HeldOut

    from nestling.model.store import load_model
    from nestling.tokenizer import read_tokenizer
    from nestling.weights.elastic import open_elastic

    recipe = base().model_copy(update={"seed": seed, "out": str(out)})
    Pipeline(recipe, "").run(until="rank")
    elastic = open_elastic(out / "parent")
    model, tokenizer = load_model(elastic), read_tokenizer(out / "parent")
    held_out = HeldOut(recipe.task.task, tokenizer, model, seed, recipe.evaluate.problems)
    parent = {"checksum": checksum(out / "parent" / "model.safetensors"), **held_out.measure(model, None)}
    for result in results().values():
        if result["seed"] == seed and result["parent"]["checksum"] != parent["checksum"]:
            made_at = result["made"]["commit"]
            sys.exit(
                f"this parent of seed {seed} is not the one in results/: take the source at commit {made_at} "
                "(git worktree add) on such a machine, or other seeds"
            )
    return parent, held_out


@cache
def base() -> Recipe:
    return read_recipe(RECIPE)


def settings(variant: Variant, seed: int) -> dict[str, Any]:
    """Everything a result depends on."""
    recipe = variant.recipe(base(), seed).model_dump(mode="json", exclude_unset=True, exclude={"title", "out"})
    controls = recipe.pop("controls")
    return recipe | ({"controls": controls} if variant.sizes == "uniform" else {}) | variant.to_json()


def fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def made() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers", "reasoning-gym", "numpy")}
    machine = {"python": platform.python_version(), "nestling": nestling.__version__, "date": date.today().isoformat()}
    return {**machine, **packages, "commit": commit()}


def commit() -> str:
    """Of the source that is running."""
    asked = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"


def write(file: Path, result: dict[str, Any]) -> None:
    """One line per entry and per point, whole or not at all."""
    points = ",\n  ".join(json.dumps(point) for point in result["points"])
    entries = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items() if key != "points"]
    entries.append(f'"points": [\n  {points}\n ]')
    write_file_atomically(file, ("{\n " + ",\n ".join(entries) + "\n}\n").encode())


def result_file(name: str, seed: int) -> Path:
    return RESULTS / f"{slug(name)}.{seed}.json"


def slug(name: str) -> str:
    """`soft for 1/6 of the steps` -> `soft-for-1-6-of-the-steps`."""
    kept = "".join(c if c.isalnum() or c in ".+" else "-" for c in name.lower())
    return "-".join(part for part in kept.split("-") if part)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # a training that was stopped has said how to go on
        sys.exit(130)
