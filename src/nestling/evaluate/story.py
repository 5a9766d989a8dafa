"""From the directories of a run to its report: figures gathered, never computed twice."""

import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from nestling.arch.architecture import Architecture, fields_of
from nestling.arch.cost import cost, parameters
from nestling.arch.nemotron_h import FIELDS
from nestling.arch.submodel import Submodel, complete, layer_sizes, tensors
from nestling.console import console
from nestling.errors import NestlingError
from nestling.evaluate.machine import machine, versions
from nestling.evaluate.measures import EVALUATION, KEPT
from nestling.evaluate.report import render, terminal_table
from nestling.ledger import MARK
from nestling.weights.elastic import Elastic, open_elastic
from nestling.weights.files import read_json, write_file_atomically, write_json

POINTS = 150  # of a curve

Rows = list[dict[str, Any]]


def tell(run: str | Path) -> dict[str, Any]:
    """Write report.json and report.html of a run's directory, and print the table."""
    run = Path(run)
    report = assemble(run)
    write_json(run / "report.json", report)
    write_file_atomically(run / "report.html", render(report).encode())
    console.print(terminal_table(report))
    console.print(f"\nThe whole story: {run / 'report.html'}\nTry next:")
    for command in report["next"]:
        console.print(f"  {command}", soft_wrap=True)
    return report


def assemble(run: Path) -> dict[str, Any]:
    """The content of report.json, from run.json and the stage directories beside it."""
    if not (run / "run.json").is_file():
        raise NestlingError(f"{run} is not the output of `nestling run`: run.json is missing")
    about = read_json(run / "run.json")
    elastic = open_elastic(run / "elastic")
    metrics = {name: _metrics(run / name) for name in ("parent", "elastic", "uniform", "scratch")}
    return {
        "title": about["title"],
        "date": date.today().isoformat(),
        "seed": about["seed"],
        "quick": about["quick"],
        "versions": versions(),
        "machine": machine(),
        "command": about["command"],
        "task": f"{about['task']}: {about.get('judged', 'held-out problems')}",
        "seconds": _seconds(run, metrics),
        "rows": [_row(run, row) for row in about["rows"]],
        "family": family_of(elastic),
        "curves": _curves(about, metrics, list(elastic.budgets)),
        "tokens": _tokens(metrics, elastic),
        "next": _next(run, list(elastic.budgets)[-1], about.get("prompt", "50+23-88=")),
    }


def _row(run: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    judged = read_json(run / row["evaluation"] / EVALUATION)
    judged_model = open_elastic(run / row["directory"])
    spent = cost(judged_model.architecture, judged_model.whole)  # whose layers may have sizes of their own
    about = {key: row[key] for key in ("name", "role", "budget")}
    return (
        about
        | {"parameters": spent.parameters, "bytes": spent.bytes}
        | {key: judged[key] for key in KEPT if key in judged}
    )


def family_of(elastic: Elastic) -> dict[str, Any]:
    architecture = elastic.architecture
    targets = {name: elastic.target(name) for name in elastic.budgets}
    members = [
        {
            "name": name,
            "parameters": parameters(architecture, submodel),
            "target": targets[name].value,
            "measured": targets[name].measure(architecture, submodel),
            "submodel": submodel.to_json(),
            "layers": _layers(architecture, submodel),
        }
        for name, submodel in elastic.budgets.items()
    ]
    parent = {"hidden_size": architecture.hidden_size, "parameters": parameters(architecture)}
    return {"pattern": architecture.hybrid_override_pattern, "parent": parent, "members": members}


def _layers(architecture: Architecture, submodel: Submodel) -> list[dict[str, Any]]:
    """Per layer of the whole model: is it kept, how many parameters of how many, and the sizes that make it."""
    kept, whole = _per_layer(architecture, submodel), _per_layer(architecture, Submodel())
    sizes = {layer: _fields(kind, axes) for layer, kind, axes in layer_sizes(architecture, submodel)}
    return [
        {
            "index": layer,
            "kind": kind,
            "kept": layer in sizes,
            "parameters": kept.get(layer, 0),
            "of": whole[layer],
            "sizes": sizes.get(layer, {}),
        }
        for layer, kind in enumerate(architecture.hybrid_override_pattern)
    ]


def _per_layer(architecture: Architecture, submodel: Submodel) -> dict[int, int]:
    counts: dict[int, int] = {}
    for tensor in tensors(architecture, complete(architecture, submodel)):
        if tensor.layer is not None:
            counts[tensor.layer] = counts.get(tensor.layer, 0) + tensor.numel
    return counts


def _fields(kind: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """The elastic config fields that shape one kind of block, with their sizes."""
    return {field: math.prod(sizes[axis] for axis in FIELDS[field].split()) for field in fields_of(kind)}


def _metrics(directory: Path) -> Rows:
    file = directory / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


def _curves(about: Mapping[str, Any], metrics: Mapping[str, Rows], budgets: list[str]) -> dict[str, Any]:
    """Points of every curve; a step that drew one budget has points of that one alone."""
    rows = metrics["elastic"]
    stages = [
        [start, f"stage {i + 1}: {text}" if text else f"stage {i + 1}"]
        for i, (start, text) in enumerate(about["stages"])
    ]
    routed = [row["step"] for row in rows if "router" in row]
    frozen = [[max(routed) + 1, "sizes frozen, hard prefixes"]] if routed else []
    return {
        "parent": {"loss": _thin((row["step"], row["loss"]) for row in metrics["parent"])},
        "elastic": {n: _thin((row["step"], row["kl"][n]) for row in rows if n in row["kl"]) for n in budgets}
        | {"stages": sorted(stages + frozen)},
        "router": _router(rows, budgets[1:]),
    }


def _router(rows: Rows, names: list[str]) -> dict[str, Any]:
    """What the router expected a budget to cost and chose for it, as long as it learnt."""
    routed = {n: [(r["step"], r["router"][n]) for r in rows if n in r.get("router", {})] for n in names}
    fields = {n: list(found[0][1]["sizes"]) if found else [] for n, found in routed.items()}
    return {
        "expected": {n: _thin((step, note["expected"]) for step, note in found) for n, found in routed.items()},
        "choices": {
            n: {f: _thin((step, note["sizes"][f]) for step, note in found) for f in fields[n]}
            for n, found in routed.items()
        },
    }


def _thin(points: Iterable[tuple[int, float]]) -> list[list[float]]:
    """At most POINTS points, each the mean of a run of neighbours."""
    every = list(points)
    width = -(-len(every) // POINTS) or 1
    runs = [every[start : start + width] for start in range(0, len(every), width)]
    return [[run[-1][0], sum(value for _, value in run) / len(run)] for run in runs]


def _tokens(metrics: Mapping[str, Rows], elastic: Elastic) -> dict[str, Any]:
    read = {name: sum(row["tokens"] for row in rows) for name, rows in metrics.items()}
    rows = metrics["elastic"]
    trained = {n: sum(row.get("budget_tokens", {}).get(n, 0) for row in rows) for n in elastic.budgets}
    return read | {"elastic": trained, "teacher": sum(row.get("teacher_tokens", 0) for row in rows)}


def _seconds(run: Path, metrics: Mapping[str, Rows]) -> dict[str, float]:
    """Wall seconds per stage; of training stages the sum over all steps, so that interruptions do not count."""
    marks = {str(mark.parent.relative_to(run)): read_json(mark)["seconds"] for mark in sorted(run.rglob(MARK))}
    trained = {name: sum(row["seconds"] for row in rows) for name, rows in metrics.items() if rows}
    names = {"ranked": "rank", "elastic": "train"}
    seconds: dict[str, float] = {}
    for stage, spent in {**marks, **trained}.items():
        kind = {"slices": "slice", "evaluations": "evaluate"}.get(stage.split("/")[0], names.get(stage, stage))
        seconds[kind] = seconds.get(kind, 0.0) + spent
    order = ("parent", "rank", "train", "uniform", "scratch", "slice", "evaluate")
    return {name: seconds[name] for name in order if name in seconds}


def _next(run: Path, smallest: str, prompt: str) -> list[str]:
    """Commands to try next, in the form in which this shell finds them."""
    call = f"{_program()} {{}} {run}/elastic"
    return [
        call.format("generate") + f" --budget {smallest} --prompt '{prompt}' --temperature 0",
        call.format("slice") + f" --budget {smallest} --out my-{smallest.rstrip('%')}",
        call.format("plan"),
    ]


def _program() -> str:
    """`nestling` where it is on the path, else how to call the one that is running."""
    if shutil.which("nestling"):
        return "nestling"
    script = Path(sys.argv[0])
    return os.path.relpath(script) if script.name == "nestling" else f"{os.path.relpath(sys.executable)} -m nestling"
