"""An elastic checkpoint on disk: a stock checkpoint, the table that describes it, and the budgets beside it."""

import itertools
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nestling.arch.architecture import Architecture
from nestling.arch.axes import Layout
from nestling.arch.between import between
from nestling.arch.cost import parameters
from nestling.arch.latency import Latencies
from nestling.arch.search import layer_order
from nestling.arch.submodel import WHOLE, Submodel, Tensor, complete, is_within, narrowed, tensors
from nestling.arch.targets import Target, parse_wish
from nestling.errors import NestlingError, nearest
from nestling.weights.checkpoint import Checkpoint, read_checkpoint
from nestling.weights.header import Entry
from nestling.weights.heterogeneous import per_layer_sizes
from nestling.weights.output import read_json
from nestling.weights.ranking import FILE as RANKING
from nestling.weights.ranking import Ranking, identity, read_ranking
from nestling.weights.side_files import FILE, FORMAT, SLICE_FILE, read_record, read_sidecar
from nestling.weights.writing import HASH

LATENCY_FILE = "latency.json"


@dataclass(frozen=True)
class Elastic:
    """A model directory that was read and checked. Any nemotron_h directory is one, with the single budget `100%`."""

    checkpoint: Checkpoint
    architecture: Architecture  # of the widest layers
    budgets: Mapping[str, Submodel]  # largest first
    sidecar: Mapping[str, Any]  # nestling.json as it stands, {} without one
    record: Mapping[str, Any]  # nestling-slice.json of what was cut out, {} of any other
    whole: Submodel  # what is stored, spelled out: its sizes may differ between layers
    filled: Submodel  # what of it is not zeros that pad narrower layers
    scales: Mapping[str, tuple[Entry, ...]]  # weight -> its quantisation scales, one number each

    def submodel(
        self, wish: "str | Submodel | Mapping[str, Any] | None", latencies: Latencies | None = None
    ) -> Submodel:
        """A budget's name (any case), a wish such as `7.5B`, a `Submodel` or its JSON; None is the whole model.

        Validated and spelled out. A wish needs a ranked checkpoint. latencies: instead of the table beside it.
        """
        if isinstance(wish, str):
            wish = self._wished(wish, latencies)
        given = WHOLE if wish is None else wish if isinstance(wish, Submodel) else Submodel.from_json(wish)
        if self.uniform:
            return narrowed(self.architecture, given, self.filled)
        if given not in (WHOLE, self.whole):
            raise NestlingError(f"{self.checkpoint.path} has sizes of its own per layer; cut what it was cut from")
        return self.whole

    @property
    def latencies(self) -> Latencies | None:
        """The table that lies beside the weights."""
        file = self.checkpoint.path / LATENCY_FILE
        return read_latencies(file) if file.is_file() else None

    def target(self, budget: str) -> Target:
        """What a trained budget asked for: where that is not recorded, what it has."""
        spec = self.sidecar.get("budgets", {}).get(budget, {}).get("target")
        if spec is None:
            return Target("parameters", parameters(self.architecture, self.budgets[budget]))
        known = {key: spec[key] for key in ("of", "value", "context", "precision") if key in spec}
        return Target(**known, table=self.latencies if spec["of"] == "latency" else None)

    def name(self, wish: str) -> str | None:
        """The budget of this name, in any case, as the family spells it."""
        return wish if wish in self.budgets else {name.lower(): name for name in self.budgets}.get(wish.lower())

    def _wished(self, wish: str, latencies: Latencies | None) -> Submodel:
        if (name := self.name(wish)) is not None:
            return self.budgets[name]
        missing = f"{self.checkpoint.path} has no budget {wish!r}; {nearest(wish, self.budgets)}"
        if not self.sidecar:
            raise NestlingError(f"{missing}; for other sizes rank it first (nestling rank), or spell one: --submodel")
        try:
            target = parse_wish(wish, self.architecture, latencies or self.latencies)
        except NestlingError as error:
            raise NestlingError(f"{missing}; {error}") from None
        order = layer_order(self.architecture, self._ranking().layers)
        return between(self.architecture, order, self.budgets, wish, target)

    def _ranking(self) -> Ranking:
        whole = identity(self.architecture)
        ranking = read_ranking(self.checkpoint.path) or whole
        if len(ranking.layers) != len(whole.layers):
            counts = f"it orders {len(ranking.layers)} layers, the model has {len(whole.layers)}"
            raise NestlingError(f"{self.checkpoint.path / RANKING}: of another model: {counts}; rank the model again")
        return ranking

    @property
    def hashes(self) -> Mapping[str, str]:
        """The hashes of the weight files that were recorded when the checkpoint was written, if Nestling wrote it."""
        return self.record.get(HASH) or self.sidecar.get(HASH, {})

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


def read_latencies(file: str | Path) -> Latencies:
    """A latency table, as nestling bench --latency wrote it."""
    try:
        return Latencies.from_json(read_json(Path(file)))
    except NestlingError as error:
        raise NestlingError(error if str(file) in str(error) else f"{file}: {error}") from None


def open_elastic(path: str | Path) -> Elastic:
    """Read a nemotron_h directory, ranked or not, and check every stored tensor against the table."""
    checkpoint = read_checkpoint(path)
    with _about(checkpoint.path / "config.json"):
        architecture = _architecture(checkpoint)
        whole = complete(architecture, Submodel.from_json(per_layer_sizes(checkpoint.config)))
    expected = {tensor.name: tensor.shape for tensor in tensors(architecture, whole)}
    scales = _scales(checkpoint, expected)
    _check_tensors(checkpoint, expected, {scale.name for found in scales.values() for scale in found})
    sidecar, record = read_sidecar(checkpoint.path), read_record(checkpoint.path)
    with _about(checkpoint.path / SLICE_FILE):
        filled = _filled(architecture, record, whole)
    with _about(checkpoint.path / FILE):
        budgets = _budgets(architecture, sidecar) if sidecar else {"100%": WHOLE if filled == whole else filled}
    return Elastic(checkpoint, architecture, budgets, sidecar, record, whole, filled, scales)


@contextmanager
def _about(what: str | Path) -> Iterator[None]:
    """Say what an error is about."""
    try:
        yield
    except NestlingError as error:
        raise NestlingError(f"{what}: {error}") from None


def _architecture(checkpoint: Checkpoint) -> Architecture:
    """Of config.json and of whether there is an output head; of no more layers and experts than there are tensors."""
    architecture = Architecture.from_config(checkpoint.config)
    for what, count in (
        ("layers", len(architecture.hybrid_override_pattern)),
        ("experts", architecture.n_routed_experts if "E" in architecture.hybrid_override_pattern else 0),
    ):
        if count > (stored := len(checkpoint.entries)):
            raise NestlingError(f"a model of {count:,} {what} has more than the {stored:,} tensors of these weights")
    tied = checkpoint.config.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise NestlingError(f"tie_word_embeddings must be true or false, not {tied!r}")
    return replace(architecture, untied=not tied or "lm_head.weight" in checkpoint.entries)


def _filled(architecture: Architecture, record: Mapping[str, Any], whole: Submodel) -> Submodel:
    """The sizes of a padded slice before it was padded, its own layers counted; of all others the whole."""
    cut = Submodel.from_json(record.get("submodel", {}))
    return complete(architecture, replace(cut, layers=None)) if record.get("hetero") == "pad" else whole


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


def _budgets(architecture: Architecture, sidecar: Mapping[str, Any]) -> dict[str, Submodel]:
    """Every size of the family, spelled out: each must lie inside the next larger one."""
    if not sidecar["budgets"]:
        raise NestlingError('budgets is {}; a family has one size at least, {"100%": {"submodel": {}}}')
    budgets = {}
    for name, budget in sidecar["budgets"].items():
        with _about(f"budget {name!r}"):
            budgets[name] = complete(architecture, Submodel.from_json(budget["submodel"]))
    descending = sorted(budgets, key=lambda name: -parameters(architecture, budgets[name]))
    for large, small in itertools.pairwise(descending):
        if not is_within(architecture, budgets[small], budgets[large]):
            raise NestlingError(
                f"budget {small!r} is not inside {large!r}, the next larger one: every layer and every size of it must "
                "be; correct its submodel, or cut it from the model with --submodel instead"
            )
    return budgets


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
