"""An elastic checkpoint on disk: a stock checkpoint, the table that describes it, and the budgets beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nestling.arch.cost import parameters
from nestling.arch.submodel import WHOLE, Architecture, Submodel, complete, tensors
from nestling.errors import NestlingError, nearest
from nestling.weights.checkpoint import Checkpoint, read_checkpoint
from nestling.weights.output import read_json

FILE = "nestling.json"
FORMAT = 1


@dataclass(frozen=True)
class Elastic:
    """A model directory that was read and checked. Any nemotron_h directory is one, with the single budget `100%`."""

    checkpoint: Checkpoint
    architecture: Architecture
    budgets: Mapping[str, Submodel]  # largest first
    sidecar: Mapping[str, Any]  # nestling.json as it stands, {} without one

    def submodel(self, wish: "str | Submodel | Mapping[str, Any] | None") -> Submodel:
        """A budget's name (any case), a `Submodel` or its JSON; None is the whole model. Validated, spelled out."""
        if isinstance(wish, str):
            wish = self._named(wish)
        given = WHOLE if wish is None else wish if isinstance(wish, Submodel) else Submodel.from_json(wish)
        return complete(self.architecture, given)

    def _named(self, wish: str) -> Submodel:
        names = {name.lower(): name for name in self.budgets}
        if (name := names.get(wish.lower())) is None:
            raise NestlingError(f"{self.checkpoint.path} has no budget {wish!r}; {nearest(wish, self.budgets)}")
        return self.budgets[name]


def open_elastic(path: str | Path) -> Elastic:
    """Read a nemotron_h directory, ranked or not, and check every stored tensor against the table."""
    checkpoint = read_checkpoint(path)
    try:
        architecture = Architecture.from_config(checkpoint.config)
    except NestlingError as error:
        raise NestlingError(f"{checkpoint.path / 'config.json'}: {error}") from None
    tied = checkpoint.config.get("tie_word_embeddings", False) and "lm_head.weight" not in checkpoint.entries
    if tied:
        architecture = replace(architecture, untied=False)
    _check_tensors(checkpoint, architecture)
    sidecar = read_json(checkpoint.path / FILE) if (checkpoint.path / FILE).exists() else {}
    return Elastic(checkpoint, architecture, _budgets(checkpoint.path / FILE, sidecar, architecture), sidecar)


def _check_tensors(checkpoint: Checkpoint, architecture: Architecture) -> None:
    expected = {tensor.name: tensor.shape for tensor in tensors(architecture)}
    for name, shape in expected.items():
        if (entry := checkpoint.entries.get(name)) is None:
            raise NestlingError(f"{checkpoint.path}: tensor {name} of shape {list(shape)} is missing from the weights")
        if entry.shape != shape:
            raise NestlingError(
                f"{entry.file}: {name} has shape {list(entry.shape)}; config.json implies {list(shape)}"
            )
    for name, entry in checkpoint.entries.items():
        if name not in expected and not name.startswith("mtp."):  # stock transformers drops multi-token heads too
            raise NestlingError(f"{entry.file}: tensor {name} is not part of a nemotron_h of this config")


def _budgets(file: Path, sidecar: Mapping[str, Any], architecture: Architecture) -> dict[str, Submodel]:
    if not sidecar:
        return {"100%": WHOLE}
    if (given := sidecar.get("format")) != FORMAT:
        raise NestlingError(f"{file}: format {given!r} cannot be read; this version reads format {FORMAT}")
    budgets = sidecar.get("budgets")
    if not isinstance(budgets, dict) or not all(isinstance(b, dict) and "submodel" in b for b in budgets.values()):
        raise NestlingError(f"{file}: budgets must be an object of {{NAME: {{'submodel': …}}}}")
    try:
        return {name: complete(architecture, Submodel.from_json(b["submodel"])) for name, b in budgets.items()}
    except NestlingError as error:
        raise NestlingError(f"{file}: {error}") from None


def sidecar(
    architecture: Architecture,
    budgets: Mapping[str, Submodel],
    provenance: Mapping[str, Any],
    *,
    targets: Mapping[str, int] | None = None,
    tokens: Mapping[str, int] | None = None,
    search_space: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of nestling.json for these budgets, largest first."""
    counts = {name: parameters(architecture, submodel) for name, submodel in budgets.items()}
    return {
        "format": FORMAT,
        "budgets": {
            name: {
                "target": {"of": "parameters", "value": (targets or counts)[name]},
                "submodel": budgets[name].to_json(),
                "parameters": counts[name],
                "tokens": (tokens or {}).get(name, 0),
            }
            for name in sorted(budgets, key=lambda name: -counts[name])
        },
        "search_space": dict(search_space or {}),
        "provenance": dict(provenance),
    }
