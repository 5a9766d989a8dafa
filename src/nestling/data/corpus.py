"""The text that a recipe names, tokenised, and read as batches: `open_corpus(...).data(stages)`."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nestling.data.batches import Batch, Data
from nestling.data.blend import shares
from nestling.data.cache import Array, Tokens, tokenized
from nestling.data.documents import Encoder
from nestling.data.packing import alone, cut, pack
from nestling.data.reading import Part, Reading
from nestling.data.records import Source
from nestling.data.sources import open_source
from nestling.errors import NestlingError
from nestling.text_sections import DataSection


@dataclass(frozen=True)
class Shape:
    """A stage of a training as its data sees it: so many steps of so many rows of at most so many tokens."""

    steps: int
    rows: int
    length: int


@dataclass(frozen=True)
class Corpus:
    """Tokenised sources and how they are mixed. Batches are functions of it, of the seed and of the step alone."""

    key: str  # of [data], such as "train"
    section: DataSection
    sources: tuple[tuple[str, float, Tokens], ...]  # name, weight, and what it holds
    seed: int
    rank: int = 0
    world: int = 1
    _readings: dict[tuple[int, int], Reading] = field(default_factory=dict, compare=False, repr=False)
    _lengths: dict[str, dict[str, int]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        return sum(len(tokens.ids) for _, _, tokens in self.sources)

    def documents(self) -> list[list[int]]:
        """The token ids of every document, source after source: to measure on."""
        return [
            tokens.ids[start:end].tolist()
            for _, _, tokens in self.sources
            for start, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
        ]

    def sharded(self, rank: int, world: int) -> "Corpus":
        """The same batches, of which this process has every `world`-th row."""
        return replace(self, rank=rank, world=world, _readings={})

    def reading(self, rows: int, length: int) -> Reading:
        """Batches of `rows` rows of at most `length` tokens, from the first document on."""
        if (made := self._readings.get((rows, length))) is None:
            made = self._readings[rows, length] = self._read(rows, length)
        return made

    def batch(self, step: int, rows: int, length: int) -> Batch:
        return self.reading(rows, length).batch(step)

    def steps(self, rows: int, length: int) -> int:
        """Batches before a source has been read once."""
        return self.reading(rows, length).steps

    def data(self, stages: Sequence[Shape]) -> Data:
        """Batches of a training in stages, by stage and step of the whole; refuses data that does not last.

        A stage goes on with documents of which those before it have read nothing, so that none is seen twice before
        all have been; only what shares a row with the border of a stage may be passed over.
        """
        left: list[Array | None] = []
        readings = []
        for number, shape in enumerate(stages):
            reading = self._read(shape.rows, shape.length, number, left)
            if self.section.repeat and reading.steps < shape.steps:  # all of it again, not what is left over and over
                reading = self._read(shape.rows, shape.length, number)
            self._check_lasting(reading.steps, number, stages)
            readings.append(reading if self.section.repeat else replace(reading, end=shape.steps))
            taken = reading.taken(shape.steps)
            left = [part.left(rows) for part, rows in zip(reading.parts, taken, strict=True)]
        starts = [0, *accumulate(shape.steps for shape in stages)]
        return lambda stage, step: readings[stage].batch(step - starts[stage])

    def _check_lasting(self, lasts: int, number: int, stages: Sequence[Shape]) -> None:
        if self.section.repeat or lasts >= (shape := stages[number]).steps:
            return
        stage = f"stage {number + 1} " if len(stages) > 1 else ""
        raise NestlingError(
            f"data.{self.key} lasts for {lasts} steps of {stage}({shape.rows} rows of {shape.length} tokens), "
            f"{shape.steps} are wanted; give more data or fewer steps, or set data.repeat = true to begin again"
        )

    def _read(self, rows: int, length: int, stage: int = 0, left: Sequence[Array | None] = ()) -> Reading:
        """left: what each source has left; empty: everything."""
        if rows % self.world:
            raise NestlingError(f"a batch of {rows} rows cannot be shared by {self.world} processes")
        parts = tuple(
            self._part(name, tokens, rest, (self.seed, index, stage), length)
            for index, ((name, _, tokens), rest) in enumerate(zip_longest(self.sources, left))
        )
        weights = shares([weight for _, weight, _ in self.sources])
        packing, seed, rank, world = self.section.packing, self.seed, self.rank, self.world
        made = Reading(parts, weights, rows, length, packing, seed, None, rank, world)
        self._lengths[str(length)] = made.counts()
        return made if self.section.repeat else replace(made, end=made.steps)

    def _part(self, name: str, tokens: Tokens, left: Array | None, seed: tuple[int, ...], length: int) -> Part:
        """left: the documents to read, in order; None: all of them, in the order of the seed."""
        if left is None:
            left = np.random.default_rng(seed).permutation(len(tokens.offsets) - 1)
        pieces = cut(tokens, left, length, self.section.long_documents)
        if not len(pieces.sizes_P):
            raise NestlingError(f"data.{self.key}: {name} has no document left that fits into {length} tokens")
        rows = pack(pieces.sizes_P, length) if self.section.packing else alone(len(pieces.sizes_P))
        return Part(tokens, left, pieces, rows, seed)

    def summary(self) -> dict[str, Any]:
        """For the record: files, hashes and counts, and what became of long documents at every length read so far."""

        def described(name: str, weight: float, tokens: Tokens) -> dict[str, Any]:
            about = {key: value for key, value in tokens.about.items() if key != "dtype"}
            files = [{key: file[key] for key in ("file", "bytes", "sha256")} for file in about["files"]]
            return {"name": name, "weight": weight, **about, "files": files}

        sources = [described(*source) for source in self.sources]
        return {"sources": sources, "tokens": self.tokens, "seed": self.seed, "lengths": dict(self._lengths)}


Key = Literal["train", "validation", "calibration"]


def open_corpus(
    section: DataSection,
    tokenizer_directory: Path,
    vocabulary: int,
    *,
    seed: int,
    cache: Path,
    say: Callable[[str], object] = print,
    key: Key = "train",
) -> Corpus:
    """Read what a recipe's [data] names under a key; tokenised now, into directories of `cache`, unless it was before.

    Everything that cannot be used is a NestlingError with its file and line, before any training.
    """
    encoder = Encoder.of(tokenizer_directory, vocabulary, section.loss_on)
    named = getattr(section, key) or (section.train if key == "calibration" else ())
    if not named:
        raise NestlingError(f"[data] has no {key}")
    weighed = [(open_source(part, seed), part.weight) for part in named if part.weight]
    made = (
        (source.name, weight, tokenized(source, encoder, cache / _slug(source), skip_bad=section.skip_bad, say=say))
        for source, weight in weighed
    )
    return Corpus(key, section, tuple(made), seed)


def _slug(source: Source) -> str:
    """`data/*.jsonl` -> `data-jsonl-1a2b3c4d`: a name for its cache."""
    digest = hashlib.sha256(json.dumps(source.identity, sort_keys=True).encode()).hexdigest()
    return f"{re.sub('[^A-Za-z0-9]+', '-', source.name).strip('-')[-40:]}-{digest[:8]}"
