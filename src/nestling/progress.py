"""Progress of long steps: a live bar with rate and time left on a terminal, now and then a line where there is none."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

QUIET_SECONDS = 10


class Progress(Protocol):
    def __call__(self, done: int, note: str = "") -> None:
        """Say how much is done in all, and something short about it (a loss, a file name)."""


@contextmanager
def progress(title: str, total: int, unit: str = "steps", start: int = 0) -> Iterator[Progress]:
    """Show one long step of `total` units, of which `start` were done before."""
    with (_bar if sys.stderr.isatty() else _lines)(title, max(total, 1), unit, start) as show:
        yield show


@contextmanager
def _bar(title: str, total: int, unit: str, start: int) -> Iterator[Progress]:
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from nestling.console import console

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, completed=start, note="", amount="")
        began = time.monotonic()

        def show(done: int, note: str = "") -> None:
            bar.update(task, completed=done, note=note, amount=_amount(done, total, start, began, unit))

        yield show


@contextmanager
def _lines(title: str, total: int, unit: str, start: int) -> Iterator[Progress]:
    began = said = time.monotonic()

    def show(done: int, note: str = "") -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < QUIET_SECONDS and (done < total or now - began < 1):
            return
        from nestling.console import console

        said = now
        left = (now - began) / max(done - start, 1) * (total - done)
        amount = _amount(done, total, start, began, unit)
        console.print(f"{title:<24} {amount}, {left:.0f} s left  {note}", soft_wrap=True)

    yield show


def _amount(done: int, total: int, start: int, began: float, unit: str) -> str:
    """`300/1000, 4.8 steps/s`; bytes in MB."""
    rate = (done - start) / max(time.monotonic() - began, 1e-9)
    if unit == "B":
        return f"{done / 1e6:,.1f}/{total / 1e6:,.1f} MB, {rate / 1e6:,.0f} MB/s"
    return f"{done:,}/{total:,}, {rate:,.1f} {unit}/s"
