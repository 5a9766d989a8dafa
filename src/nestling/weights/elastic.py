"""An elastic checkpoint on disk: a stock checkpoint, the table that describes it, and the budgets beside it."""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nestling.arch.axes import Layout
from nestling.arch.between import between
from nestling.arch.cost import parameters
from nestling.arch.search import layer_order
from nestling.arch.submodel import WHOLE, Architecture, Submodel, Tensor, complete, tensors
from nestling.arch.targets import Target, parse_wish
from nestling.errors import NestlingError, nearest
from nestling.weights.checkpoint import Checkpoint, Entry, read_checkpoint
from nestling.weights.heterogeneous import per_layer_sizes
from nestling.weights.output import read_json
from nestling.weights.ranking import read_ranking

FILE = "nestling.json"
FORMAT = 1


@dataclass(frozen=True)
class Elastic:
    """A model directory that was read and checked. Any nemotron_h directory is one, with the single budget `100%`."""

    checkpoint: Checkpoint
    architecture: Architecture  # of the widest layers
    budgets: Mapping[str, Submodel]  # largest first
    sidecar: Mapping[str, Any]  # nestling.json as it stands, {} without one
    whole: Submodel  # what is stored, spelled out: its sizes may differ between layers
    scales: Mapping[str, tuple[Entry, ...]]  # weight -> its quantisation scales, one number each

    def submodel(self, wish: "str | Submodel | Mapping[str, Any] | None") -> Submodel:
        """A budget's name (any case), a wish such as `7.5B`, a `Submodel` or its JSON; None is the whole model.

        Validated and spelled out. A wish needs a ranked checkpoint.
        """
        if isinstance(wish, str):
            wish = self._wished(wish)
        given = WHOLE if wish is None else wish if isinstance(wish, Submodel) else Submodel.from_json(wish)
        if self.uniform:
            return complete(self.architecture, given)
        if given not in (WHOLE, self.whole):
            raise NestlingError(f"{self.checkpoint.path} has sizes of its own per layer; cut what it was cut from")
        return self.whole

    def _wished(self, wish: str) -> Submodel:
        if wish in self.budgets:
            return self.budgets[wish]
        names = {name.lower(): name for name in self.budgets}
        if (name := names.get(wish.lower())) is not None:
            return self.budgets[name]
        missing = f"{self.checkpoint.path} has no budget {wish!r}; {nearest(wish, self.budgets)}"
        if not self.sidecar:
            raise NestlingError(f"{missing}; for other sizes rank it first (nestling rank), or spell one: --submodel")
        try:
            target = parse_wish(wish, self.architecture)
        except NestlingError as error:
            raise NestlingError(f"{missing}; {error}") from None
        ranking = read_ranking(self.checkpoint.path)
        order = range(len(self.architecture.hybrid_override_pattern)) if ranking is None else ranking.layers
        return between(self.architecture, layer_order(self.architecture, order), self.budgets, wish, target)

    @property
    def uniform(self) -> bool:
        """Whether all layers of a kind have the same sizes, as stock models do."""
        return self.whole == complete(self.architecture, WHOLE)

    def stored(self, submodel: Submodel) -> Iterator[Tensor]:
        """Every tensor of a sub-model, in checkpoint order: the table's, and behind a weight its scales."""
        for tensor in tensors(self.architecture, submodel):
            tensor = (
                tensor if self.uniform else replace(tensor, full=tensor.kept)
            )  # then only the whole can be asked for
            yield tensor
            for scale in self.scales.get(tensor.source, ()):
                name = tensor.name.removesuffix("weight") + scale.name.rsplit(".", 1)[1]
                layout = Layout(((("1",),),) * len(scale.shape))
                yield replace(tensor, name=name, source=scale.name, layout=layout, buffer=True)


def open_elastic(path: str | Path) -> Elastic:
    """Read a nemotron_h directory, ranked or not, and check every stored tensor against the table."""
    checkpoint = read_checkpoint(path)
    try:
        architecture = Architecture.from_config(checkpoint.config)
        whole = complete(architecture, Submodel.from_json(per_layer_sizes(checkpoint.config)))
    except NestlingError as error:
        raise NestlingError(f"{checkpoint.path / 'config.json'}: {error}") from None
    tied = checkpoint.config.get("tie_word_embeddings", False) and "lm_head.weight" not in checkpoint.entries
    if tied:
        architecture = replace(architecture, untied=False)
    expected = {tensor.name: tensor.shape for tensor in tensors(architecture, whole)}
    scales = _scales(checkpoint, expected)
    _check_tensors(checkpoint, expected, {scale.name for found in scales.values() for scale in found})
    sidecar = read_json(checkpoint.path / FILE) if (checkpoint.path / FILE).exists() else {}
    budgets = _budgets(checkpoint.path / FILE, sidecar, architecture)
    return Elastic(checkpoint, architecture, budgets, sidecar, whole, scales)


def _scales(checkpoint: Checkpoint, expected: Mapping[str, Any]) -> dict[str, tuple[Entry, ...]]:
    """The quantisation scales beside each weight, such as `q_proj.weight_scale`, one number each."""
    found: dict[str, tuple[Entry, ...]] = {}
    for name, entry in checkpoint.entries.items():
        module, _, leaf = name.rpartition(".")
        if name in expected or not leaf.endswith(("_scale", "_scale_inv")) or f"{module}.weight" not in expected:
            continue
        if entry.numel != 1:
            shape = list(entry.shape)
            raise NestlingError(f"{entry.file}: {name} has shape {shape}; only one scale per tensor can be sliced")
        found[f"{module}.weight"] = (*found.get(f"{module}.weight", ()), entry)
    return found


def _check_tensors(checkpoint: Checkpoint, expected: Mapping[str, Any], scales: Set[str]) -> None:
    for name, shape in expected.items():
        if (entry := checkpoint.entries.get(name)) is None:
            raise NestlingError(f"{checkpoint.path}: tensor {name} of shape {list(shape)} is missing from the weights")
        if entry.shape != shape:
            raise NestlingError(
                f"{entry.file}: {name} has shape {list(entry.shape)}; config.json implies {list(shape)}"
            )
    for name, entry in checkpoint.entries.items():
        if name not in expected and name not in scales and not name.startswith("mtp."):  # stock drops these too
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
    targets: Mapping[str, Target] | None = None,
    tokens: Mapping[str, int] | None = None,
    search_space: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of nestling.json for these budgets, largest first."""
    counts = {name: parameters(architecture, submodel) for name, submodel in budgets.items()}
    counted = {name: Target("parameters", count) for name, count in counts.items()}
    return {
        "format": FORMAT,
        "budgets": {
            name: {
                "target": (targets or counted)[name].to_json(),
                "submodel": budgets[name].to_json(),
                "parameters": counts[name],
                "tokens": (tokens or {}).get(name, 0),
            }
            for name in sorted(budgets, key=lambda name: -counts[name])
        },
        "search_space": dict(search_space or {}),
        "provenance": dict(provenance),
    }
