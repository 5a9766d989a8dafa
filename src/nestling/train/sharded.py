"""The state of a training that several processes share, by PyTorch's distributed checkpoints (DCP).

One is a directory: every rank's shards in files of its own, DCP's index of them, and a note with the checksum of each
file. Any number of processes reads what any number wrote.
"""

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from nestling import ranks
from nestling.weights.files import checksum, read_json, write_json

NOTE, INDEX = "note.json", ".metadata"


def begin(directory: Path, tensors: Mapping[str, Tensor], asynchronous: bool) -> "Future[Any] | None":
    """Write this rank's shards into a directory that exists; or start to, from copies. All must call it."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed import group

    if asynchronous:
        begun: Any = dcp.async_save(dict(tensors), checkpoint_id=directory, process_group=_writers(group.WORLD))
        return begun
    dcp.save(dict(tensors), checkpoint_id=directory)
    return None


def failure() -> type[BaseException]:
    """What is raised on all ranks when one of them could not write; of one process nothing is."""
    from torch.distributed.checkpoint import CheckpointException

    found: type[BaseException] = CheckpointException
    return found


@lru_cache(maxsize=1)
def _writers(world: Any) -> Any:
    """A process group for what is said while a training goes on."""
    from torch.distributed import new_group

    return new_group(timeout=ranks.PATIENCE)


def seal(directory: Path, note: Mapping[str, Any]) -> None:
    """Add the note to what all ranks have written. All must call it."""
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
