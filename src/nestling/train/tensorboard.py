"""The metrics of a run as TensorBoard scalars, beside metrics.jsonl, for who asks for them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nestling.errors import NestlingError


def check_installed() -> None:
    """Refuse before a run what could not be written during it."""
    if find_spec("tensorboard") is None:
        raise NestlingError("tensorboard = true needs tensorboard: pip install 'nestling[tensorboard]'")


@contextmanager
def event_file(directory: Path | None, start: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Writes rows of metrics from step `start` on; what was written of later steps by a killed run is void."""
    if directory is None:
        yield lambda row: None
        return
    check_installed()
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory), purge_step=start) as writer:

        def write(row: Mapping[str, Any]) -> None:
            for tag, value in scalars(row):
                writer.add_scalar(tag, value, row["step"])

        yield write


def scalars(row: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """(tag, number) of every number in a row of metrics but its step: `kl/50%`, `router/50%/sizes/hidden_size`."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{path}{key}/")
        elif isinstance(value, int | float) and key != "step":
            yield f"{path}{key}", value
