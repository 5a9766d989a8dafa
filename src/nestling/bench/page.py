"""The table, as it is printed line by line, as a page, and as JSON."""

from collections.abc import Iterable, Mapping
from typing import Any

from nestling.bench.figure import MORE, Figure
from nestling.bench.machine import GIB, Limits

FORMAT = 1
HEADER = (
    "| row | case | against | least / median / most | to reach | ours | of the limit |\n|---|---|---|---|---|---|---|"
)


def heading(about: Mapping[str, Any], limits: Limits) -> str:
    """What was measured with, and what the machine can do."""
    figures = [f"{name} products {value / 1e9:,.0f} GFLOP/s" for name, value in limits.flops.items()]
    figures += [f"{name} {value / GIB:.1f} GiB/s" for name, value in _bandwidths(limits).items()]
    with_ = " · ".join(f"{key} {value}" for key, value in about.items())
    return f"{with_}\n\nLimits in this run: {' · '.join(figures)}\n"


def _bandwidths(limits: Limits) -> dict[str, float]:
    found = {"reading": limits.read, "copying (read + written)": limits.copy}
    return {name: value for name, value in found.items() if value is not None}


def line(figure: Figure) -> str:
    spread = " / ".join(_short(value) for value in figure.spread)
    reach = ""
    if figure.reach is not None:
        sign = "≥" if figure.unit in MORE else "≤"
        reach = f"{sign} {figure.reach:g}, {'yes' if figure.reached else 'no'}"
    ours = "" if figure.seconds is None else _time(figure.seconds)
    limit = "" if figure.limit is None else f"{figure.limit:.0%} {figure.limit_of}"
    cells = (figure.row, figure.case, figure.rival, f"{spread} {figure.unit}", reach, ours, limit)
    return "|" + "|".join(f" {cell} " for cell in cells) + "|"


def curves(figures: Iterable[Figure]) -> str:
    """The points behind the curves, if there are any."""
    shown = [
        f"- {figure.case}, {figure.rival}: " + ", ".join(_point(*point) for point in figure.points)
        for figure in figures
        if figure.points
    ]
    return "\n".join(["", *shown]) if shown else ""


def to_json(about: Mapping[str, Any], limits: Limits, figures: Iterable[Figure]) -> dict[str, Any]:
    measured = {"flops": dict(limits.flops), "read": limits.read, "copy": limits.copy}
    return {"format": FORMAT, **about, "limits": measured, "figures": [figure.to_json() for figure in figures]}


def page(command: str, about: Mapping[str, Any], limits: Limits, figures: list[Figure]) -> str:
    """The same as Markdown, for benchmarks/results."""
    table = "\n".join(line(figure) for figure in figures)
    return (
        f"# Speed, {about['date']}\n\n    {command}\n\n{heading(about, limits)}\n{HEADER}\n{table}\n{curves(figures)}\n"
    )


def _point(size: float, seconds: float, flops: float) -> str:
    return f"{size:g}: {_time(seconds)} ({flops / seconds / 1e9:.3g} GFLOP/s)"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.3g} s"
        if seconds >= 1
        else f"{seconds * 1e3:.3g} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.3g} µs"
    )
