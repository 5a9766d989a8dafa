"""The state of a training that several processes share, by PyTorch's distributed checkpoints (DCP).

One is a directory: every rank's shards in files of its own, DCP's index of them, and a note with the checksum of each
file. Any number of processes reads what any number wrote.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nestling import ranks
from nestling.weights.files import checksum, read_json, write_json

NOTE, INDEX = "note.json", ".metadata"


def write(directory: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Every rank writes its shards into a directory that exists, the first one also the note. All must call it."""
    from torch.distributed import checkpoint as dcp

    dcp.save(dict(tensors), checkpoint_id=directory)
    own = [*directory.glob(f"__{ranks.rank()}_*"), *([directory / INDEX] if ranks.first() else [])]
    every = ranks.gathered({path.name: checksum(path) for path in own})
    if ranks.first():
        write_json(directory / NOTE, {**note, "files": {name: value for each in every for name, value in each.items()}})


def read_note(directory: Path) -> Any:
    """The note of a checkpoint that is whole; a ValueError or an OSError if it is not."""
    note = read_json(directory / NOTE)
    for name, value in note["files"].items():
        if checksum(directory / name) != value:
            raise ValueError(f"the checksum of {name} is wrong")
    return note


def read(directory: Path, like: Callable[[str, tuple[int, ...]], Tensor]) -> dict[str, Tensor]:
    """What this rank needs of every tensor. like: (name, shape of the whole) -> a tensor to be filled."""
    from torch.distributed import checkpoint as dcp

    known = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    found = {name: like(name, tuple(about.size)) for name, about in known.items()}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in a single process")  # which is meant
        dcp.load(found, checkpoint_id=directory, no_dist=ranks.size() == 1)
    return found
