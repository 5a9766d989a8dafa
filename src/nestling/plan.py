"""`nestling plan`: what a model and each of its budgets cost, read off the table without touching weights."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestling.arch.cost import cost
from nestling.arch.presets import PRESETS
from nestling.arch.submodel import WHOLE, Architecture, Submodel
from nestling.errors import NestlingError, nearest
from nestling.weights.elastic import open_elastic
from nestling.weights.output import read_json

if TYPE_CHECKING:
    from rich.table import Table

UNITS = {
    "parameters": "parameters",
    "active_parameters": "active parameters per token",
    "bytes": "bytes of weights (bf16)",
    "kv_bytes_per_token": "bytes of KV cache per token (bf16)",
    "ssm_bytes_per_sequence": "bytes of Mamba state per sequence (fp32, window bf16)",
    "flops_per_token": "FLOPs per token",
    "flops_per_context_token": "more FLOPs per token looked back on",
}


def figures(target: str) -> dict[str, Any]:
    """The target's own costs, and under "budgets" those of each member of its family, with the same keys."""
    architecture, budgets = _read(target)
    family = {name: asdict(cost(architecture, submodel)) for name, submodel in budgets.items()}
    return {**asdict(cost(architecture)), "budgets": family}


def _read(target: str) -> tuple[Architecture, dict[str, Submodel]]:
    path = Path(target)
    if target.lower() in PRESETS:
        return PRESETS[target.lower()], {"100%": WHOLE}
    if path.is_dir() and any(path.glob("*.safetensors")):
        elastic = open_elastic(path)
        return elastic.architecture, dict(elastic.budgets)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file() or path.suffix == ".json" or len(path.parts) > 1:
        return Architecture.from_config(read_json(path)), {"100%": WHOLE}
    raise NestlingError(f"{target!r} is neither a path nor a preset; {nearest(target, PRESETS)}")


def table(target: str, found: dict[str, Any]) -> "Table":
    """The figures side by side: the whole model, and each smaller budget."""
    from rich.table import Table

    grid = Table(title=target, title_justify="left")
    grid.add_column("")
    columns = found["budgets"] if len(found["budgets"]) > 1 else {"whole model": found}
    for name in columns:
        grid.add_column(name, justify="right")
    for key, unit in UNITS.items():
        grid.add_row(unit, *(f"{column[key]:,}" for column in columns.values()))
    return grid
