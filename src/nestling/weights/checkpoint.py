"""Model directories in Hugging Face's layout: config.json, and where each tensor lies. No pickle is ever opened."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.errors import NestlingError
from nestling.weights.files import read_regular_json, reason
from nestling.weights.header import Entry, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face model directory: its config.json and where each tensor lies, in the order of the files."""

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Find and check every tensor of a model directory, reading no weights. Anything wrong is a NestlingError.

    `model.safetensors` wins over an index beside it, as in transformers.
    """
    path = Path(path)
    names = _list_directory(path)
    if "config.json" not in names:
        raise NestlingError(f"{path}: no config.json; a Hugging Face model directory is needed")
    config = read_regular_json(path / "config.json")
    if SINGLE in names:
        entries = {entry.name: entry for entry in read_header(path / SINGLE)}
    elif INDEX in names:
        entries = _read_shards(path)
    else:
        raise NestlingError(f"{path}: {_missing_weights(names)}")
    return Checkpoint(path, config, entries)


def _list_directory(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        raise NestlingError(f"{path}: no such directory; download the model first and give its local path") from None
    except NotADirectoryError:
        raise NestlingError(f"{path}: not a directory; give the model directory that holds config.json") from None
    except (OSError, ValueError) as error:
        raise NestlingError(f"{path}: cannot be read: {reason(error)}") from None


def _missing_weights(names: list[str]) -> str:
    found = [name for name in names if name.endswith(".safetensors")]
    if found:
        return f"neither {SINGLE} nor {INDEX}, only {found[0]!r}; restore the index that belongs to it"
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    if pickles:
        convert = "load it where you trust it and call save_pretrained(DIR, safe_serialization=True)"
        return f"{pickles[0]!r} is a pickle, only safetensors and JSON are read; {convert}"
    return f"no weights: neither {SINGLE} nor {INDEX}"


def _read_shards(path: Path) -> dict[str, Entry]:
    """The tensors of every shard that the index names; index and shards must agree."""
    index = path / INDEX
    where = _read_index(index)
    entries: dict[str, Entry] = {}
    for shard in sorted(set(where.values())):
        for entry in read_header(path / shard):
            if entry.name in entries:
                both = f"{entries[entry.name].file.name} and {shard}"
                raise NestlingError(f"{path}: tensor {entry.name!r} is in two files, {both}; remove one")
            entries[entry.name] = entry
    for name, shard in where.items():
        if name not in entries or entries[name].file.name != shard:
            raise NestlingError(f"{index}: tensor {name!r} is not in {shard}, where the index says it is")
    return entries


def _read_index(index: Path) -> dict[str, str]:
    """The index's weight_map, tensor to file: each file named must lie in the directory of the index."""
    where = read_regular_json(index, unique=True).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise NestlingError(f"{index}: must have a weight_map from tensor names to file names")
    for name, shard in where.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise NestlingError(f"{index}: {name!r} is in {shard!r}; allowed: *.safetensors in the same directory")
        if not os.path.lexists(index.with_name(shard)):
            raise NestlingError(f"{index}: names {shard}, which is missing; download it again")
    return where


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and name.isprintable() and not any(mark in name for mark in "/\\:")
