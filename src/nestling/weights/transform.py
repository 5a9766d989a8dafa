"""Permute and slice checkpoints, tensor by tensor, in constant memory. Both are one fold: gather positions, write."""

import fnmatch
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import nestling
from nestling.arch.submodel import WHOLE, Submodel
from nestling.weights.cut import Output, renumbered
from nestling.weights.elastic import FILE, open_elastic, sidecar
from nestling.weights.files import read_json, write_json
from nestling.weights.gather import Buffers, Piece, Reading, readings
from nestling.weights.header import Entry
from nestling.weights.heterogeneous import copy_code
from nestling.weights.output import output_directory
from nestling.weights.ranking import Ranking, save_ranking
from nestling.weights.turns import Job, Rest, Turn, in_turns
from nestling.weights.writing import HASH, SHARD_BYTES, WeightsWriter

Advance = Callable[[int], None]
"""Is told of the bytes written since it was told before."""

COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "vocab.*", "merges.txt", "*.model", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Files beside the weights that go along with every copy of a model."""
READ_AHEAD = 16  # chunks, which the disk fetches meanwhile
_QUANTIZATION = "hf_quant_config.json"  # goes along too, its layers renumbered


def write(
    outputs: Mapping[Path, Output], shard_bytes: int = SHARD_BYTES, advance: Advance = lambda count: None
) -> dict[Path, dict[str, str]]:
    """Write models of one checkpoint into existing directories in a single pass: weights, config and companion files.

    Returns per directory the hash of each weight file by name.
    """
    (elastic,) = {id(output.elastic): output.elastic for output in outputs.values()}.values()
    with ExitStack() as stack:
        writers = {
            out: stack.enter_context(WeightsWriter(out, list(output.planned.values()), shard_bytes))
            for out, output in outputs.items()
        }
        buffers = Buffers()
        in_turns(
            _ahead(
                job
                for source in _reading_order(list(outputs.values()))
                for job in _jobs(
                    elastic.checkpoint.entries[source],
                    source,
                    [(writers[out], output) for out, output in outputs.items() if source in output.tensors],
                    buffers,
                    advance,
                )
            )
        )
    for out, output in outputs.items():
        write_json(out / "config.json", output.config(), flush=False)
        if output.hetero == "code":
            copy_code(out)
        copy_companions(elastic.checkpoint.path, out)
        _copy_quantization(elastic.checkpoint.path, out, output.submodel)
    return {out: writer.digests for out, writer in writers.items()}


def _reading_order(outputs: Sequence[Output]) -> list[str]:
    """The tensors that any output takes, so that each output gets its own in the order of writing."""
    everything = Output(outputs[0].elastic, outputs[0].elastic.whole, outputs[0].ranking, dtype=outputs[0].dtype)
    assert len({output.dtype for output in outputs}) == 1
    return [source for source in everything.planned if any(source in output.tensors for output in outputs)]


def _ahead(jobs: Iterator[Job]) -> Iterator[Job]:
    """The same, but `READ_AHEAD` of them are made early: from then on the disk fetches what they read."""
    waiting = deque(islice(jobs, READ_AHEAD))
    while waiting:
        yield waiting.popleft()
        waiting.extend(islice(jobs, 1))


def _jobs(
    entry: Entry, source: str, takers: Sequence[tuple[WeightsWriter, Output]], buffers: Buffers, advance: Advance
) -> Iterator[Job]:
    """Each writes a chunk of one stored tensor."""
    changes = [output.converter(source, buffers) for _, output in takers]
    wanted = [output.positions(output.tensors[source]) for _, output in takers]

    def pieces(read: Reading) -> Iterator[Piece]:
        for number, data in read():
            yield number, data if (change := changes[number]) is None else change(data)

    def make(read: Reading) -> Turn:
        """One piece for each is made before its turn, which is all, if no padding is longer than what is read."""
        rest = pieces(read)
        return partial(place_all, [*islice(rest, len(takers))], rest)

    def place(number: int, data: np.ndarray) -> Callable[[], None]:
        writer, output = takers[number]
        advance(len(data))
        return writer.place(output.planned[source].name, data)

    def place_all(first: list[Piece], rest: Iterator[Piece]) -> Rest:
        """In its turn a piece is hashed and given its place; it is written there beside others."""
        writes = [place(*piece) for piece in first]
        for piece in rest:
            place(*piece)()
        return partial(_call_each, writes)

    for read in readings(entry, wanted, buffers=buffers):
        yield partial(make, read)


def _call_each(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def copy_companions(source: Path, out: Path) -> None:
    """Copy the tokenizer, chat template and the like, as they are."""
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(file, out / file.name)


def read_quantization(source: Path) -> dict[str, Any]:
    """hf_quant_config.json beside the weights; {} where there is none."""
    return read_json(source / _QUANTIZATION) if (source / _QUANTIZATION).is_file() else {}


def _copy_quantization(source: Path, out: Path, submodel: Submodel) -> None:
    if found := read_quantization(source):
        write_json(out / _QUANTIZATION, renumbered(found, submodel), flush=False)


def permute(
    source: str | Path,
    ranking: Ranking,
    out: str | Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    also: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    advance: Advance = lambda count: None,
) -> None:
    """Write the elastic checkpoint of a model: the same function, every axis in the order of `ranking`.

    also: JSON files to put beside it, by name.
    """
    elastic = open_elastic(source)
    made = {"by": f"nestling {nestling.__version__}", **(provenance or {})}
    with output_directory(out, overwrite=overwrite) as partial:
        digests = write({partial: Output(elastic, elastic.whole, ranking)}, advance=advance)[partial]
        save_ranking(ranking, partial)
        side = sidecar(elastic.architecture, {"100%": WHOLE}, made) | {HASH: digests}
        write_json(partial / FILE, side, flush=False)
        write_also(partial, also)


def write_also(out: Path, also: Mapping[str, Any] | None) -> None:
    """JSON files by name."""
    for name, value in (also or {}).items():
        write_json(out / name, value, flush=False)
