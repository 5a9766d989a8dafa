"""How a ranking's axes and figures are written, on its page and on the terminal alike."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nestling.evaluate.report import BLANK, percent, whole
from nestling.evaluate.spread import Curve, Spread

SHARES = (50, 75, 90)
"""Percent of the positions whose part of all importance is told."""


@dataclass(frozen=True)
class Axis:
    """What people call an axis: in headings, in `--metric`, and the kind of block it belongs to."""

    title: str
    name: str
    kind: str = ""
    inside: str = ""


AXES = {
    "d": Axis("Hidden channels", "hidden"),
    "f": Axis("FFN neurons", "ffn", "-"),
    "h": Axis("Mamba heads", "mamba_heads", "M", "SSM group"),
    "p": Axis("Mamba head channels", "mamba_channels", "M"),
    "q": Axis("Attention heads", "attention_heads", "*", "KV group"),
    "e": Axis("Experts", "experts", "E"),
    "m": Axis("Expert neurons", "expert_ffn", "E", "expert"),
    "s": Axis("Shared expert neurons", "shared_ffn", "E"),
}


def shown(spread: Spread) -> list[tuple[Axis, list[Curve]]]:
    """The axes that the ranking has, with the curves of each."""
    return [(axis, found) for letter, axis in AXES.items() if (found := spread.axis(letter))]


def figure(number: float | None) -> str:
    """Three digits: `0.127`, `1.30`, `2.40e-05`."""
    if number is None or not math.isfinite(number):
        return BLANK
    return f"{number:#.3g}".rstrip(".") if number else "0"


def correlation(value: float | None) -> str:
    """Three decimals, never rounded up to a perfect 1."""
    return BLANK if value is None else f"{value if value >= 1 else min(value, 0.999):.3f}"


def held(curve: Curve, share: int) -> str:
    """What the best so many percent hold, as a percentage."""
    value = curve.held(share)
    return percent(value if math.isfinite(value) else None)


def bend(curve: Curve) -> str:
    """`knee 31 (8%)`, or that there is none."""
    if curve.knee is None:
        return "no knee"
    part = 100 * curve.knee / curve.map.shape[1]
    return f"knee {whole(curve.knee)} ({part:.{0 if part >= 1 else 1}f}%)"


def positions(curve: Curve) -> str:
    groups, size = curve.map.shape
    return whole(size) if groups == 1 else f"{groups} × {whole(size)}"


def place(curve: Curve) -> str:
    return "all layers" if curve.layer is None else f"layer {curve.layer}"


def between(values: Iterable[float], form: Callable[[float], str]) -> str:
    """The lowest and the highest of some values, or the one that they all are."""
    found = [value for value in values if math.isfinite(value)]
    return BLANK.join(dict.fromkeys(form(value) for value in (min(found), max(found)))) if found else BLANK


def depth(made: Mapping[str, Any]) -> str | None:
    """`iterative, 31 rounds`"""
    how = made.get("depth")
    if not isinstance(how, dict):
        return None
    return f"{how.get('method')}, {how['rounds']} rounds" if "rounds" in how else str(how.get("method"))
