"""The page of a ranking: one self-contained HTML file (no scripts, no network) that shows how importance is spread.

Python turns the arrays of a `Spread` into positions, labels and sentences; `ranking.html.j2` draws them, in the manner
of report.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nestling.evaluate.report import BLANK, KINDS, Scale, duration, percent, templates, whole
from nestling.evaluate.spelling import (
    AXES,
    SHARES,
    Axis,
    bend,
    between,
    correlation,
    depth,
    figure,
    held,
    place,
    positions,
    shown,
)
from nestling.evaluate.spread import BEND, FEWEST, Curve, Layer, Spread

Json = dict[str, Any]
GENERATOR = "nestling rank --inspect"
"""What a page says it was written by: such a file may be written again."""

STABLE = 0.9
"""A rank correlation between halves of the data from which an order is called stable: a convention."""

POINTS = 48  # of a drawn curve, evenly; half as many more gather at its head
STEPS = 32  # up to so many positions each one is drawn as a step
LEVELS = 6  # shades of a heat map


# ---- curves


def line(x: Sequence[float] | np.ndarray, y: np.ndarray) -> str:
    """Points of an SVG polyline in a box of 100 × 100, y (0 … 1) upwards."""
    return " ".join(f"{100 * a:.4g},{100 - 100 * b:.4g}" for a, b in zip(x, y, strict=True))


def drawn(curve: Curve) -> Json:
    """A small plot: scores as a share of the highest, what the best hold together, and the knee between positions."""
    values, shares, knee = curve.values, np.nan_to_num(curve.shares), curve.knee
    size, top = len(values), values[0] if values[0] > 0 else 1.0
    picked = np.unique(np.r_[np.linspace(0, size - 1, POINTS), np.geomspace(1, size, POINTS // 2) - 1].astype(int))
    edges = np.arange(size + 1).repeat(2)[1:-1] / size
    steps = size <= STEPS
    middles = np.r_[0, (picked + 0.5) / size, 1]
    scores = line(edges, values.repeat(2) / top) if steps else line(middles, values[np.r_[0, picked, -1]] / top)
    said = f"{AXES[curve.axis].title}, {place(curve)}, {positions(curve)} positions. "
    said += "; ".join(f"the best {share}% hold {held(curve, share)}" for share in SHARES)
    return {
        "curve": curve,
        "said": f"{said}; {bend(curve)}.",
        "scores": scores,
        "shares": line([0.0, *(picked + 1) / size], np.array([0.0, *shares[picked]])),
        "knee": None if knee is None else (round(100 * knee / size, 2), round(100 - 100 * shares[knee - 1], 2)),
    }


def glance(axis: Axis, curves: Sequence[Curve], spread: Spread) -> Json:
    """One row of the overview."""
    knees = [curve.knee for curve in curves if curve.knee is not None]
    stable = [curve.stability for curve in curves if curve.stability is not None]
    metrics = spread.provenance.get("metrics")
    return {
        "axis": axis,
        "metric": metrics.get(axis.name, BLANK) if isinstance(metrics, dict) else BLANK,
        "positions": positions(curves[0]),
        "curves": len(curves),
        "held": [between([curve.held(share) for curve in curves], percent) for share in SHARES],
        "knee": between(knees, whole) if knees else "none",
        "knees": len(knees),
        "stability": correlation(min(stable, default=None)),
    }


# ---- layers, heads, stability


def level(score: float, highest: float) -> int:
    """The shade of a heat map for a score: 0 … LEVELS - 1, evenly from nothing to the highest."""
    return min(LEVELS - 1, max(0, int(LEVELS * score / highest))) if highest > 0 else 0


def layer_scale(layers: Sequence[Layer]) -> Scale:
    """From zero; or by decades, where the highest score is more than 30 times the lowest and none is zero."""
    scores = [layer.score for layer in layers]
    low, high = min(scores), max(scores)
    if low > 0 and high > 30 * low:
        return Scale(10.0 ** math.floor(math.log10(low) - 0.1), high, log=True)
    return Scale(0.0, high if high > 0 else 1.0)


def layer_bars(spread: Spread) -> Json:
    scale = layer_scale(spread.layers)
    return {"scale": scale, "bars": [(layer, max(scale.at(layer.score), 1.0)) for layer in spread.layers]}


def head_map(curve: Curve) -> Json:
    """Rows of (place, shade, score), one row for each group."""
    highest = float(curve.map.max())
    rows = [
        [(int(own), level(float(score), highest), figure(float(score))) for own, score in zip(a, b, strict=True)]
        for a, b in zip(curve.places, curve.map, strict=True)
    ]
    return {"curve": curve, "rows": rows, "highest": figure(highest)}


def is_stable(value: float) -> bool:
    """Judged as it is written, with three decimals."""
    return round(value, 3) >= STABLE


def stability(spread: Spread) -> Json | None:
    """Dots on one scale per axis, and the least stable of each; None where nothing was measured."""
    rows: list[tuple[str, list[tuple[str, float]]]] = [
        (axis.title, [(place(c), c.stability) for c in curves if c.stability is not None])
        for axis, curves in shown(spread)
    ]
    rows.append(("Layers", [] if spread.stability is None else [("all layers", spread.stability)]))
    rows = [(title, found) for title, found in rows if found]
    if not rows:
        return None
    least = min(value for _, found in rows for _, value in found)
    scale = Scale(next(low for low in (0.9, 0.8, 0.5, 0.0, -1.0) if low <= least or low == -1.0), 1.0)
    return {
        "rows": [
            (title, [(name, scale.at(v), v, is_stable(v)) for name, v in found], min(found, key=lambda pair: pair[1]))
            for title, found in rows
        ],
        "ticks": [(scale.at(tick), f"{tick:g}") for tick in scale.ticks(5)],
        "stable": scale.at(STABLE),
        "good": sum(is_stable(value) for _, found in rows for _, value in found),
        "count": sum(len(found) for _, found in rows),
    }


def rounds_map(spread: Spread) -> Json | None:
    """The errors of an iterative ranking, round by round: for each shade the path of its cells; None for one round."""
    rounds = spread.rounds
    if rounds is None or len(rounds) < 2 or not (rounds > 0).any():
        return None
    low, high = float(np.nanmin(rounds[rounds > 0])), float(np.nanmax(rounds))
    scale = Scale(low, high, log=True)
    cells: list[list[str]] = [[] for _ in range(LEVELS)]
    for (row, column), error in np.ndenumerate(rounds):
        if np.isfinite(error):
            cells[level(scale.at(max(error, low)), 100)].append(f"M{column} {row}h1v1h-1z")
    return {"shape": rounds.shape, "paths": ["".join(found) for found in cells], "low": low, "high": high}


# ---- the page


def source(one: Json) -> str:
    """A file of calibration data."""
    digest = str(one.get("sha256"))[:12]
    return f"{one.get('file')}: {one.get('samples')} samples, weight {one.get('weight')}, sha256 {digest}…"


def provenance(spread: Spread) -> list[tuple[str, list[str]]]:
    """What was ranked, on what and how, as far as it was recorded."""
    made, data = spread.provenance, spread.provenance.get("data")
    found = [source(one) for one in (data if isinstance(data, list) else []) if isinstance(one, dict)]
    seconds = made.get("seconds")
    table: list[tuple[str, list[Any]]] = [
        ("Parent", [made.get("parent")]),
        ("Data", [*found, made.get("task")]),
        ("Samples", [made.get("samples")]),
        ("Tokens", [made.get("tokens")]),
        ("Length", [f"at most {whole(made['length'])} tokens" if type(made.get("length")) is int else None]),
        ("Batch", [made.get("batch")]),
        ("Depth", [depth(made)]),
        ("Seed", [made.get("seed")]),
        ("Time", [duration(seconds) if isinstance(seconds, int | float) else None]),
        ("Made by", [made.get("by")]),
    ]
    written = [
        (term, [whole(v) if type(v) is int else str(v) for v in values if v is not None]) for term, values in table
    ]
    return [(term, values) for term, values in written if values]


def headline(spread: Spread) -> str:
    order = spread.ordered()
    said = [f"layer {layer.index} ({KINDS[layer.kind]})" for layer in (order[0], order[-1])]
    return f"Of {len(spread.layers)} layers, {said[0]} matters most and {said[1]} least"


def render(spread: Spread) -> str:
    """The whole page, in light and dark, at a desk and on a phone."""
    environment = templates()
    environment.filters |= {"figure": figure, "correlation": correlation}
    page = environment.get_template("ranking.html.j2")
    return page.render(
        spread=spread,
        title=spread.path.resolve().name,
        headline=headline(spread),
        provenance=provenance(spread),
        depth=depth(spread.provenance) or "",
        axes=[
            (axis, [drawn(curve) for curve in curves], [head_map(c) for c in curves if axis.inside])
            for axis, curves in shown(spread)
        ],
        glance=[glance(axis, curves, spread) for axis, curves in shown(spread)],
        layers=layer_bars(spread),
        rounds=rounds_map(spread),
        stability=stability(spread),
        bend_limit=BEND,
        fewest=FEWEST,
        generator=GENERATOR,
        words={"shares": SHARES, "stable": STABLE, "levels": LEVELS, "kinds": KINDS},
        say={"held": held, "bend": bend, "positions": positions, "place": place},
    )
