"""Permute and slice checkpoints, tensor by tensor, in constant memory. Both are one fold: gather positions, write."""

import fnmatch
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import nestling
from nestling.arch.axes import Keep, Sizes
from nestling.arch.cost import parameters
from nestling.arch.submodel import WHOLE, Submodel, Tensor, standalone, tensors
from nestling.errors import NestlingError
from nestling.weights.checkpoint import gather
from nestling.weights.elastic import FILE, Elastic, open_elastic, sidecar
from nestling.weights.output import output_directory, write_json
from nestling.weights.ranking import Ranking, identity, save_ranking
from nestling.weights.writing import Planned, write_weights

Advance = Callable[[int], None]
SLICE_FILE = "nestling-slice.json"

COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "vocab.*", "merges.txt", "*.model", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Files beside the weights that go along with every copy of a model."""


def permute(
    source: str | Path,
    ranking: Ranking,
    out: str | Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    also: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    advance: Advance | None = None,
) -> None:
    """Write the elastic checkpoint of a model: the same function, every axis in the order of `ranking`.

    also: JSON files to put beside it, by name.
    """
    elastic = open_elastic(source)
    with output_directory(out, overwrite=overwrite) as partial:
        digests = _write(elastic, WHOLE, ranking, partial, advance)
        save_ranking(ranking, partial)
        made = {"by": f"nestling {nestling.__version__}", **(provenance or {})}
        write_json(partial / FILE, sidecar(elastic.architecture, {"100%": WHOLE}, made) | {"sha256": digests})
        _write_also(partial, also)


def slice(  # noqa: A001 - the public verb is nestling.slice
    source: str | Path,
    submodel: str | Submodel | Mapping[str, Any],
    out: str | Path,
    *,
    hetero: str = "auto",
    also: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    advance: Advance | None = None,
    budget: str | None = None,
) -> Submodel:
    """Cut one sub-model out into a standalone stock checkpoint; returns it spelled out.

    submodel: a budget's name, a `Submodel`, or its JSON. hetero: what to do with sizes that differ between layers,
    which no stock config holds: "auto" refuses, "pad" fills up to the widest with zeros (exact, no memory gain). also:
    JSON files to put beside it, by name.
    """
    elastic = open_elastic(source)
    chosen = elastic.submodel(submodel)
    _check_exportable(chosen, hetero)
    with output_directory(out, overwrite=overwrite) as partial:
        digests = _write(elastic, chosen, identity(elastic.architecture), partial, advance)
        record = {
            "format": 1,
            "by": f"nestling {nestling.__version__}",
            "source": str(source),
            "budget": submodel if isinstance(submodel, str) else budget,
            "submodel": chosen.to_json(),
            "parameters": parameters(elastic.architecture, chosen),
            "sha256": digests,
        }
        write_json(partial / SLICE_FILE, record)
        _write_also(partial, also)
    return chosen


def planned_bytes(elastic: Elastic, submodel: Submodel) -> int:
    """Bytes of tensor data that cutting this sub-model out will write."""
    target = standalone(elastic.architecture, submodel)
    sources = {
        tensor.name: elastic.checkpoint.entries[tensor.source] for tensor in tensors(elastic.architecture, submodel)
    }
    return sum(tensor.numel * sources[tensor.name].itemsize for tensor in tensors(target))


def _check_exportable(submodel: Submodel, hetero: str) -> None:
    if hetero not in ("auto", "pad"):
        raise NestlingError(f"hetero must be 'auto' or 'pad', not {hetero!r}")
    mixed = [field for field, value in submodel.given().items() if isinstance(value, tuple) and field != "layers"]
    if "mamba_num_heads" in mixed:
        raise NestlingError(
            "mamba_num_heads differs between layers: no checkpoint format can hold that; use one number"
        )
    if mixed and hetero == "auto":
        raise NestlingError(
            f"{mixed[0]} differs between layers, and a stock config holds one number; "
            "--hetero pad fills up to the widest with zeros (exact, no memory gain)"
        )


def _write(
    elastic: Elastic, submodel: Submodel, ranking: Ranking, out: Path, advance: Advance | None
) -> dict[str, str]:
    """Weights, config and companion files of one sub-model; returns the SHA-256 of each weight file."""
    source, architecture = elastic.checkpoint, elastic.architecture
    target = standalone(architecture, submodel)
    stored = {tensor.name: tensor for tensor in tensors(architecture, submodel)}
    shapes = {tensor.name: tensor.shape for tensor in tensors(target)}
    entries = {name: source.entries[_source(t, ranking.keep(t.layer))] for name, t in stored.items()}
    planned = [Planned(name, entries[name].dtype, shapes[name]) for name in stored]
    slots = target.sizes()

    def produce(name: str) -> Iterable[Any]:
        tensor, entry = stored[name], entries[name]
        chunks = gather(entry, tensor.layout.positions(tensor.full, prefixes(tensor, ranking.keep(tensor.layer))))
        return (
            chunks if tensor.shape == shapes[name] else _padded(tensor, slots, chunks, np.dtype(f"V{entry.itemsize}"))
        )

    digests = write_weights(out, planned, produce, advance=advance)
    write_json(out / "config.json", target.to_config(source.config))
    copy_companions(source.path, out)
    return digests


def _source(tensor: Tensor, orders: Keep) -> str:
    """The name a tensor is read from. Experts are an axis that lives in the name, so their order is applied to it."""
    if tensor.expert is None or "e" not in orders:
        return tensor.source
    return tensor.source.replace(f".experts.{tensor.expert}.", f".experts.{orders['e'][tensor.expert]}.")


def prefixes(tensor: Tensor, orders: Keep) -> Keep:
    """Axis -> kept positions of one tensor: the first of each order, [kept] or [outer, kept]; whole axes left out."""
    return {
        axis: orders.get(axis, np.arange(full))[..., :kept]
        for axis, full, kept in ((a, tensor.full[a], tensor.kept[a]) for a in tensor.layout.axes if not a.isdigit())
        if axis in orders or kept != full
    }


def _padded(tensor: Tensor, slots: Sizes, chunks: Iterable[Any], dtype: np.dtype) -> Iterator[Any]:
    """The tensor at its place among zeros: the same prefix of every axis, in a tensor of the widest layer's sizes."""
    small = np.frombuffer(b"".join(chunks), dtype=dtype).reshape(tensor.shape)
    large = np.zeros(tensor.layout.shape(slots), dtype=dtype)
    prefix = {axis: np.arange(tensor.kept[axis]) for axis in tensor.layout.axes if not axis.isdigit()}
    large[np.ix_(*(positions for positions in tensor.layout.positions(slots, prefix) if positions is not None))] = small
    yield large.data


def _write_also(out: Path, also: Mapping[str, Any] | None) -> None:
    for name, value in (also or {}).items():
        write_json(out / name, value)


def copy_companions(source: Path, out: Path) -> None:
    """Copy the tokenizer, chat template and the like, as they are."""
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(file, out / file.name)
