"""Progress of long steps: a live bar with rate and time left on a terminal, a line every tenth where there is none."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console

console = Console(stderr=True, highlight=False)


class Progress(Protocol):
    def __call__(self, done: int, note: str = "") -> None:
        """Say how much is done in all, and something short about it (a loss, a file name)."""


@contextmanager
def progress(title: str, total: int, unit: str = "steps", start: int = 0) -> Iterator[Progress]:
    """Show one long step of `total` units, of which `start` were done before."""
    with (_bar if console.is_terminal else _lines)(title, max(total, 1), unit, start) as show:
        yield show


@contextmanager
def _bar(title: str, total: int, unit: str, start: int) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>14}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, completed=start, note="", rate="")
        began = time.monotonic()

        def show(done: int, note: str = "") -> None:
            bar.update(task, completed=done, note=note, rate=_rate(done - start, began, unit))

        yield show


@contextmanager
def _lines(title: str, total: int, unit: str, start: int) -> Iterator[Progress]:
    began, shown = time.monotonic(), [start * 10 // total]

    def show(done: int, note: str = "") -> None:
        if (tenth := done * 10 // total) > shown[0]:
            shown[0] = tenth
            left = (time.monotonic() - began) / max(done - start, 1) * (total - done)
            rate = _rate(done - start, began, unit)
            console.print(f"{title:<22} {done}/{total} {rate}, {left:.0f} s left  {note}", soft_wrap=True)

    yield show


def _rate(done: int, began: float, unit: str) -> str:
    rate = done / max(time.monotonic() - began, 1e-9)
    return f"{rate:.3g} {unit}/s" if rate < 1000 else f"{rate:,.0f} {unit}/s"
