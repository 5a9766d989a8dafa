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

T = TypeVar("T")

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun says to every process that it starts."""

PATIENCE = timedelta(days=7)
"""How long one waits for another: as long as its share may take, since torchrun ends all when one of them ends."""

LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")
"""Of which one at least is in the message of a collective that failed."""

_MET: list[Any] = []


@contextmanager
def together() -> Iterator[None]:
    """Meet the other processes that torchrun started, if it did. Only the first rank speaks, errors aside."""
    if not all(name in os.environ for name in LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    import torch.distributed

    with ExitStack() as after:
        with _reachable():
            torch.distributed.init_process_group("gloo", timeout=PATIENCE, **_meeting_point(torch.distributed))
        after.callback(torch.distributed.destroy_process_group)
        _MET.append(torch.distributed)
        after.callback(_MET.clear)
        if not first():
            from nestling.console import console

            after.enter_context(redirect_stdout(after.enter_context(open(os.devnull, "w"))))
            after.callback(setattr, console, "quiet", console.quiet)
            console.quiet = True
        with _reachable():
            yield


def _meeting_point(distributed: Any) -> dict[str, Any]:
    """Where processes find one another: a store that is new to them.

    torchrun keeps one store through its restarts, in which the addresses of processes that have ended are still to be
    found. On one machine all processes agree on how often they were started. On several they need not, and there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun begin a new store.
    """
    store, rank, count = next(distributed.rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        store = distributed.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return {"store": store, "rank": rank, "world_size": count}


@contextmanager
def _reachable() -> Iterator[None]:
    """Say in a line that another process was lost, which every one that waits for it hears of."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in LOST):
            raise
        raise NestlingError(
            "another of the processes has ended or is out of reach; its own message says why, if it could leave one"
        ) from error


def _group() -> Any:
    """torch.distributed while processes are together; a group that others started, to train, is no concern of ours."""
    return _MET[-1] if _MET else None


def rank() -> int:
    group = _group()
    return group.get_rank() if group else 0


def size() -> int:
    group = _group()
    return group.get_world_size() if group else 1


def size_here() -> int:
    """How many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) if _group() else 1


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
    group.all_gather_object(found, value)
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


@contextmanager
def said_once() -> Iterator[None]:
    """A refusal inside is one of all processes, from what all of them read: the first of each machine says it."""
    try:
        yield
    except NestlingError:
        if size() > 1 and os.environ.get("LOCAL_RANK", str(rank())) != "0":
            raise SystemExit(2) from None
        raise


@contextmanager
def alone() -> Iterator[None]:
    """What is inside concerns this process alone, as if there were no others."""
    met = _MET[:]
    _MET.clear()
    try:
        yield
    finally:
        _MET[:] = met


def of_first(make: Callable[[], T]) -> T:
    """What the first rank made, by itself, on every rank."""
    made = None
    if first():
        with alone():
            made = make()
    found: Any = gathered(made)[0]
    return found


@contextmanager
def in_turn() -> Iterator[None]:
    """What is inside is done by the first rank before the others do it, who find made what it left on the disk."""
    if not first():
        gathered(None)
    with alone():
        yield
    if first():
        gathered(None)
