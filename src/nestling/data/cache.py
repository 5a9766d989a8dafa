"""Tokens of a source on the disk, made once: ids, where documents begin, what counts. Read through memory maps.

T tokens · D documents. A cache says what it was made of and is made again when that has changed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nestling.data.documents import Document, Encoder
from nestling.data.lines import sha256
from nestling.data.records import Record, Source
from nestling.errors import NestlingError
from nestling.progress import progress
from nestling.weights.files import read_json, write_json
from nestling.weights.output import output_directory

INDEX, FILES = "index.json", ("ids", "offsets", "counted")
TOGETHER, TOGETHER_BYTES = 256, 2**23  # documents tokenised at a time, and text read for them
SHOWN = 10  # of what was skipped
TOKENIZER = ("tokenizer.json",)
TEMPLATE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tokens:
    """The documents of a source: document i is ids[offsets[i] : offsets[i + 1]]."""

    ids: Array  # [T]
    offsets: Array  # [D + 1]
    counted: Array  # [T], True where a token is to be learnt
    about: dict[str, Any]  # of what they were made, and counts

    @property
    def all_counted(self) -> bool:
        return bool(self.about["counted"] == self.about["tokens"])

    @staticmethod
    def read(directory: Path) -> "Tokens":
        about = read_json(directory / INDEX)
        types = zip(FILES, (about["dtype"], np.int64, bool), strict=True)
        ids, offsets, counted = (np.memmap(directory / name, dtype, "r") for name, dtype in types)
        if not len(ids) == len(counted) == about["tokens"] == offsets[about["documents"]]:
            raise ValueError("cut short")
        return Tokens(ids, offsets, counted, about)


def tokenized(
    source: Source, encoder: Encoder, directory: Path, *, skip_bad: bool, say: Callable[[str], object] = print
) -> Tokens:
    """The tokens of a source, from its cache if that was made of the same, else made now and cached."""
    known = _about(directory)
    wanted = _made_of(source, encoder, skip_bad, known)
    if known:
        reason = _difference(known, wanted)
        try:
            if reason is None:
                return Tokens.read(directory)
        except (NestlingError, OSError, ValueError, KeyError, TypeError):
            reason = "is damaged"
        say(f"{directory}: {reason}; its texts are tokenised again")
    try:
        _make(source, encoder, directory, wanted, skip_bad)
    except NestlingError:
        if not (there := _about(directory)) or _difference(there, wanted):
            raise  # else another process has just made the same
    return Tokens.read(directory)


def _about(directory: Path) -> dict[str, Any]:
    try:
        return read_json(directory / INDEX)
    except NestlingError:
        return {}


def _made_of(source: Source, encoder: Encoder, skip_bad: bool, known: dict[str, Any]) -> dict[str, Any]:
    """All that the tokens depend on."""
    hashes = {(each["file"], each["bytes"], each["modified"]): each["sha256"] for each in known.get("files", [])}

    def described(file: Path) -> dict[str, Any]:
        key = (str(file), file.stat().st_size, file.stat().st_mtime_ns)
        return dict(zip(("file", "bytes", "modified"), key, strict=True)) | {"sha256": hashes.get(key) or sha256(file)}

    return {
        "source": source.identity,
        "files": [described(file) for file in source.files],
        "tokenizer": _hashes(encoder.directory, TOKENIZER),
        "template": _hashes(encoder.directory, TEMPLATE) | {"end": encoder.end},
        "options": {"loss_on": encoder.loss_on, "skip_bad": skip_bad, "vocabulary": encoder.vocabulary},
    }


def _hashes(directory: Path, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: sha256(directory / name) for name in names if (directory / name).is_file()}


def _difference(known: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """What a cache was made of that is not so any more; the time of a file alone does not matter."""
    said = {
        "tokenizer": "was made by another tokenizer",
        "template": "was made with another chat template or end token",
        "options": "was made with other options",
        "source": "was made of another source",
        "files": "was made of other files, or of what they were before",
    }

    def content(about: dict[str, Any], key: str) -> Any:
        return [(f["file"], f["sha256"]) for f in about[key]] if key == "files" else about.get(key)

    return next((said[key] for key in said if content(known, key) != content(wanted, key)), None)


def _make(source: Source, encoder: Encoder, directory: Path, wanted: dict[str, Any], skip_bad: bool) -> None:
    done, skipped = 0, list[str]()
    with output_directory(directory, overwrite=True, flush=False) as partial, ExitStack() as opened:
        writer = _Writer.begin(partial, "uint16" if encoder.vocabulary <= 2**16 else "uint32", opened)
        show = opened.enter_context(progress(f"tokenise {directory.name}", *source.total))
        for chunk in _chunks(source.records()):
            for made in encoder(chunk):
                if isinstance(made, Document):
                    writer.add(made)
                elif skip_bad:
                    skipped.append(str(made))
                else:
                    raise NestlingError(f"{made}; data.skip_bad = true leaves such out and counts them")
            done += sum(record.amount for record in chunk)
            show(done)
        if not writer.documents:
            raise NestlingError(f"{source.name} has no text to learn from{_of(skipped)}")
        skips = {"skipped": len(skipped), "first_skipped": skipped[:SHOWN]}
        write_json(partial / INDEX, {**wanted, **writer.counts(), **skips, "dtype": writer.dtype})


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    """What is tokenised together, which is all of the source that is in memory."""
    chunk: list[Record] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == TOGETHER or sum(each.amount for each in chunk) > TOGETHER_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _of(skipped: list[str]) -> str:
    return f"; {len(skipped)} were skipped, the first because {skipped[0]}" if skipped else ""


@dataclass
class _Writer:
    """Appends documents to the files of a cache."""

    ids: BinaryIO
    offsets: BinaryIO
    counted: BinaryIO
    dtype: str
    documents: int = 0
    tokens: int = 0
    learnt: int = 0

    @staticmethod
    def begin(directory: Path, dtype: str, opened: ExitStack) -> "_Writer":
        ids, offsets, counted = (opened.enter_context((directory / name).open("wb")) for name in FILES)
        offsets.write(np.int64(0).tobytes())
        return _Writer(ids, offsets, counted, dtype)

    def add(self, document: Document) -> None:
        counted = np.ones(len(document.ids), bool) if document.counted is None else np.array(document.counted)
        self.documents, self.tokens = self.documents + 1, self.tokens + len(document.ids)
        self.learnt += int(counted.sum())
        self.ids.write(np.array(document.ids, self.dtype).tobytes())
        self.counted.write(counted.tobytes())
        self.offsets.write(np.int64(self.tokens).tobytes())

    def counts(self) -> dict[str, int]:
        return {"documents": self.documents, "tokens": self.tokens, "counted": self.learnt}
