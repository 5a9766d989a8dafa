"""`nestling slice`: any sizes of a checkpoint as standalone ones that stock tools load, in one pass over its bytes."""

import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nestling
from nestling.arch.latency import Latencies
from nestling.arch.submodel import WHOLE, Submodel
from nestling.arch.targets import parse_wish
from nestling.errors import NestlingError
from nestling.units import decimal
from nestling.weights.card import model_card
from nestling.weights.convert import parse_dtype
from nestling.weights.cut import Output
from nestling.weights.elastic import Elastic, open_elastic, read_latencies
from nestling.weights.files import write_file_atomically, write_json
from nestling.weights.output import output_directory
from nestling.weights.ranking import identity
from nestling.weights.side_files import FORMAT, HETERO, SLICE_FILE, read_record
from nestling.weights.transform import Advance, read_quantization, write, write_also
from nestling.weights.writing import HASH, SHARD_BYTES

Wish = str | Submodel | Mapping[str, Any] | None
"""A size: a budget's name, a wish such as `7.5B`, a `Submodel` or its JSON; None is the whole model."""


def slice(  # noqa: A001 - the public verb is nestling.slice
    source: str | Path,
    size: Wish,
    out: str | Path,
    *,
    advance: Advance = lambda count: None,
    also: Mapping[str, Any] | None = None,
    **how: Any,
) -> Submodel:
    """Cut one size out into a standalone checkpoint; returns it spelled out. how: options of `plan_slices`."""
    slicing = plan_slices(source, {out: size}, **how)
    slicing.write(advance, also)
    return slicing.outputs[Path(out)].submodel


def plan_slices(
    source: str | Path,
    sizes: Mapping[Any, Wish],
    *,
    hetero: str = "auto",
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    flush: bool = False,
    latency_table: str | Path | None = None,
) -> "Slicing":
    """What cutting these sizes out, by output directory, will do; everything that can be refused is refused here.

    hetero: how to hold sizes that differ between layers, which no stock config can: "auto" refuses, "pad" fills up to
    the widest with zeros (exact, loads everywhere, no memory gain), "code" writes custom code beside the weights
    (`trust_remote_code`). dtype: "bf16", "fp16" or "fp32"; None keeps every type. overwrite: replace outputs that
    Nestling wrote before. flush: wait until everything is on the disk; a slice can be cut again, and `verify` knows a
    damaged one, so that by default it is left to the system, as `cp` does. latency_table: a file for wishes in
    milliseconds, instead of the one beside the checkpoint.
    """
    if hetero not in HETERO:
        raise NestlingError(f"hetero must be one of {', '.join(HETERO)}, not {hetero!r}")
    if shard_bytes < 1:
        raise NestlingError(f"shards must have at least one byte, not {shard_bytes}")
    elastic, code = open_elastic(source), parse_dtype(dtype)
    latencies = elastic.latencies if latency_table is None else read_latencies(latency_table)
    read_quantization(elastic.checkpoint.path)  # said now, not after the weights are written
    _check_separate([Path(out).resolve() for out in sizes])
    outputs = {}
    for out, wish in sizes.items():
        chosen = elastic.submodel(wish, latencies)
        outputs[Path(out)] = Output(elastic, chosen, identity(elastic.architecture), _form(chosen, hetero), code)
        _check_apart(Path(source), Path(out))
    names = {Path(out): elastic.name(wish) or wish if isinstance(wish, str) else None for out, wish in sizes.items()}
    return Slicing(elastic, outputs, names, shard_bytes, overwrite, flush, latencies)


def _form(submodel: Submodel, hetero: str) -> str:
    """How one sub-model will be held; refuses what no form holds."""
    mixed = [field for field, value in submodel.given().items() if isinstance(value, tuple) and field != "layers"]
    if "mamba_num_heads" in mixed:
        raise NestlingError(
            "mamba_num_heads differs between layers: no checkpoint format can hold that; use one number"
        )
    if mixed and hetero == "auto":
        raise NestlingError(
            f"{mixed[0]} differs between layers, and a stock config holds one number; --hetero pad fills up to the "
            "widest with zeros (exact, loads everywhere, no memory gain), --hetero code writes custom code beside the "
            "weights (trust_remote_code in transformers and vLLM)"
        )
    return hetero if mixed else "auto"


def _check_separate(outs: Sequence[Path]) -> None:
    """Outputs appear one by one, each by a rename: none may lie inside another."""
    for one, other in itertools.permutations(outs, 2):
        if one.is_relative_to(other):
            raise NestlingError(f"{one} and {other} are two outputs, of which one holds the other; choose others")


def _check_apart(source: Path, out: Path) -> None:
    if out.resolve() == source.resolve():
        raise NestlingError(f"{out}: is the checkpoint that is cut; choose another --out")
    if out.resolve().is_relative_to(source.resolve()):
        raise NestlingError(f"{out}: lies inside the checkpoint that is cut, {source}; choose another --out")


@dataclass(frozen=True)
class Slicing:
    """Sizes of one checkpoint about to be cut."""

    elastic: Elastic
    outputs: Mapping[Path, Output]
    names: Mapping[Path, str | None]  # by which name or wish a size was asked for
    shard_bytes: int
    overwrite: bool
    flush: bool
    latencies: Latencies | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data that will be written."""
        return sum(output.nbytes for output in self.outputs.values())

    def notes(self) -> dict[Path, str]:
        """What to say about a wish that is so large that it is the whole model."""
        architecture, named = self.elastic.architecture, {name.lower() for name in self.elastic.budgets}
        wishes = {
            out: parse_wish(name, architecture, self.latencies)
            for out, name in self.names.items()
            if name is not None and name.lower() not in named and self.outputs[out].submodel == self.elastic.whole
        }
        held = {out: wish.show(wish.measure(architecture, WHOLE)) for out, wish in wishes.items()}
        return {out: f"{self.names[out]} holds the whole model, which has {has}" for out, has in held.items()}

    def write(self, advance: Advance = lambda count: None, also: Mapping[str, Any] | None = None) -> None:
        """Write every output, or none. also: JSON files to put beside each, by name."""
        with ExitStack() as stack:
            partial = {
                out: stack.enter_context(output_directory(out, overwrite=self.overwrite, flush=self.flush))
                for out in self.outputs
            }
            self._check_space(next(iter(partial.values())))
            digests = write({partial[out]: output for out, output in self.outputs.items()}, self.shard_bytes, advance)
            for out, directory in partial.items():
                record = self._record(out, digests[directory])
                write_json(directory / SLICE_FILE, record, flush=False)
                _write_card(directory, model_card(self.elastic, record), flush=False)
                write_also(directory, also)

    def _check_space(self, directory: Path) -> None:
        if (free := shutil.disk_usage(directory).free) < self.nbytes:
            need = f"{decimal(self.nbytes)} are needed, {decimal(free)} are free"
            raise NestlingError(f"{directory.parent}: the disk is too full: {need}")

    def _record(self, out: Path, digests: Mapping[str, str]) -> dict[str, Any]:
        """The content of nestling-slice.json."""
        output, source = self.outputs[out], self.elastic
        return {
            "format": FORMAT,
            "by": f"nestling {nestling.__version__}",
            "source": os.fspath(source.checkpoint.path),
            "source_hashes": dict(source.hashes),
            "budget": self.names[out],
            "submodel": output.submodel.to_json(),
            "parameters": output.parameters,
            "hetero": output.hetero,
            "attends": output.attends,
            "dtype": output.dtype,
            "provenance": source.sidecar.get("provenance", {}),
            HASH: digests,
        }


def write_card(elastic: str | Path, out: str | Path) -> None:
    """Write the model card of a slice again, from what is recorded in the checkpoint it was cut from."""
    if not (record := read_record(Path(out))):
        raise NestlingError(f"{out} has no {SLICE_FILE}; cut it again")
    _write_card(Path(out), model_card(open_elastic(elastic), record), flush=True)


def _write_card(directory: Path, card: str, flush: bool) -> None:
    write_file_atomically(directory / "README.md", card.encode("utf-8", "backslashreplace"), flush=flush)
