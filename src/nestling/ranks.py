"""Processes that share work under torchrun.

Each has a rank, 0 … size - 1, does its own share, and meets the others where results come together. With one process
everything here is the identity, and torch is not imported. How weights are cut up is for train/distributed.py to say.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

from nestling.errors import NestlingError
from nestling.progress import console

T = TypeVar("T")

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun says to every process that it starts."""

PATIENCE = timedelta(days=7)
"""How long one waits for another: as long as its share may take, since torchrun ends all when one of them ends."""

_MET: list[Any] = []


@contextmanager
def together() -> Iterator[None]:
    """Meet the other processes that torchrun started, if it did. Only the first rank speaks, errors aside."""
    if not all(name in os.environ for name in LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    import torch.distributed

    with ExitStack() as after:
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        after.callback(torch.distributed.destroy_process_group)
        _MET.append(torch.distributed)
        after.callback(_MET.clear)
        if not first():
            after.enter_context(redirect_stdout(after.enter_context(open(os.devnull, "w"))))
            after.callback(setattr, console, "quiet", console.quiet)
            console.quiet = True
        yield


def _group() -> Any:
    """torch.distributed while processes are together; a group that others started, to train, is no concern of ours."""
    return _MET[-1] if _MET else None


def rank() -> int:
    group = _group()
    return group.get_rank() if group else 0


def size() -> int:
    group = _group()
    return group.get_world_size() if group else 1


def first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return rank() == 0


def mine(items: Iterable[T]) -> Iterator[T]:
    """The items that are this rank's: every `size`-th, from its own on."""
    return islice(items, rank(), None, size())


def gathered(value: T) -> list[T]:
    """What every rank gave, in order of rank, on every rank. All of them must call it."""
    group = _group()
    if group is None:
        return [value]
    found: list[Any] = [None] * size()
    try:
        group.all_gather_object(found, value)
    except RuntimeError as error:
        raise NestlingError(
            "another of the processes has ended or is out of reach; its own message says why"
        ) from error
    return found


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """The sums over ranks of numbers that each of them has by the same names."""
    every = gathered(values)
    return {name: sum(each[name] for each in every) for name in values}


def whole(tensor: Any) -> Any:
    """A tensor of which every rank has a shard, whole on every rank; any other tensor as it is. All must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_of(tensor: Any, like: Any) -> Any:
    """This rank's shard of a tensor that every rank has whole, cut as another is; as it is, if that is no shard."""
    if not hasattr(like, "full_tensor") or hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def of_first(make: Callable[[], T]) -> T:
    """What the first rank made, on every rank."""
    found: Any = gathered(make() if first() else None)[0]
    return found
