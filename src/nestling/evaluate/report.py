"""The report of a run: one self-contained HTML page (no scripts, no network) and a table for the terminal.

Python turns the figures of `report.json` into positions, labels and sentences; `report.html.j2` draws them. Positions
are percentages of a plot, so charts stretch with the window while their text keeps its size.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template
    from rich.table import Table

Json = dict[str, Any]
Points = list[tuple[float, float]]

KINDS = {"M": "Mamba-2", "*": "attention", "-": "MLP", "E": "mixture of experts"}
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BLANK = "–"


def percent(share: float | None) -> str:
    return BLANK if share is None else f"{100 * share:.1f}%"


def whole(number: float | None) -> str:
    return BLANK if number is None else f"{number:,.0f}"


def short(number: float | None, unit: str = "") -> str:
    """Three figures and an SI prefix: `712 k`, `1.42 MB`."""
    if number is None:
        return BLANK
    power = min(int(math.log10(max(abs(number), 1)) + 1e-9) // 3, 4)
    scaled = number / 1000**power
    digits = 0 if power == 0 or scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{scaled:.{digits}f} {('', 'k', 'M', 'G', 'T')[power]}{unit}".rstrip()


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` laid out from 0 to 100, evenly or by their logarithm."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, here = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return round(100 * (here - low) / (high - low), 2)

    def top(self, value: float) -> float:
        """The distance from the top edge, as SVG counts."""
        return round(100 - self.at(value), 2)

    def ticks(self, count: int) -> list[float]:
        """Round values within the scale: multiples of 1, 2 or 5 times a power of ten, or such numbers on a log scale."""
        if self.log:
            heads = (1, 2, 5) if self.high < 30 * self.low else (1,)
            found = [float(f"{head}e{power}") for power in range(-9, 10) for head in heads]
        else:
            step = round_step(self.high - self.low, count)
            first = math.ceil(self.low / step - 1e-9)
            found = [round(step * k, 10) for k in range(first, first + 3 * count)]
        slack = 1e-9 * (self.high - self.low)
        return [value for value in found if self.low - slack <= value <= self.high + slack]


def round_step(span: float, count: int) -> float:
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(head * power for head in (1, 2, 5, 10) if head * power >= 0.999 * span / count)


def fitted(values: Sequence[float], log: bool = False) -> Scale:
    """A scale that holds all values; a linear one ends on round numbers."""
    low, high = min(values), max(values)
    if log:
        return Scale(low * 0.9, high * 1.1, log=True)
    step = round_step(high - low or abs(high) or 1.0, 4)
    low = step * math.floor(low / step + 1e-9)
    return Scale(low, max(step * math.ceil(high / step - 1e-9), low + step))


def thinned(points: Iterable[Sequence[float | None]], limit: int = 120) -> tuple[Points, int]:
    """The finite points as at most `limit` means over runs of neighbours, and the length of a run."""
    found = [(x, y) for x, y in points if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)]
    run = math.ceil(len(found) / limit) or 1
    parts = [found[i : i + run] for i in range(0, len(found), run)]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts], run


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions moved to lie `gap` apart, none beyond 100, so that labels do not collide."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed, last, ceiling = list(positions), -math.inf, 100.0
    for i in order:
        last = placed[i] = max(placed[i], last + gap)
    for i in reversed(order):
        placed[i] = round(min(placed[i], ceiling), 2)
        ceiling = placed[i] - gap
    return placed


def strengths(report: Json) -> dict[str, int]:
    """The accent's strength for each size: 0 for the largest, 2 for the smallest."""
    members = [member["name"] for member in (report.get("family") or {}).get("members", [])]
    names = members or [row["name"] for row in report.get("rows", []) if row["role"] == "elastic"]
    return {name: round(2 * i / max(len(names) - 1, 1)) for i, name in enumerate(names)}


def plot(
    title: str, series: Mapping[str, Sequence], colors: Mapping[str, int], height: int = 190, log: bool = False,
    hold: Sequence[float] = (), marks: Sequence = (), reference: float | None = None,
) -> Json | None:
    """What the template needs to draw a line per series over training steps; None where there is nothing to draw.

    The y scale (`log` only where values span a decade; else with the values to `hold`) is `height` pixels high; `marks`
    are (step, text); `reference` is a value drawn as a line across.
    """
    drawn = {name: thinned(points) for name, points in series.items()}
    drawn = {name: found for name, found in drawn.items() if found[0]}
    if not drawn:
        return None
    values = [value for points, _ in drawn.values() for _, value in points]
    log = log and min(values) > 0 and max(values) > 10 * min(values)
    y = fitted(values, log=True) if log else fitted([*values, *hold])
    steps = [step for points, _ in drawn.values() for step, _ in points]
    x = Scale(min(0, *steps), max(1, *steps))
    lines = [line(name, points, x, y, colors.get(name, 3)) for name, (points, _) in drawn.items()]
    return {
        "title": title, "height": height, "log": log, "run": max(run for _, run in drawn.values()),
        "lines": list(zip(lines, spread([one["end"][1] for one in lines], 1400 / height), strict=True)),
        "x_ticks": [(x.at(v), f"{v:,g}") for v in x.ticks(5 if height > 150 else 2)],
        "y_ticks": [(y.top(v), f"{v:,g}") for v in y.ticks(4 if height > 150 else 2)],
        "marks": [(x.at(step), step, text) for step, text in marks if x.low <= step <= x.high],
        "reference": None if reference is None else y.top(reference),
    }


def line(name: str, points: Points, x: Scale, y: Scale, strength: int) -> Json:
    placed = [(x.at(step), y.top(value)) for step, value in points]
    path = " ".join(f"{left:g},{top:g}" for left, top in placed)
    return {"name": name, "path": path, "end": placed[-1], "strength": strength, "last": f"{points[-1][1]:.4g}"}


def curves(report: Json, colors: Mapping[str, int]) -> Json:
    found = report.get("curves") or {}
    elastic = dict(found.get("elastic") or {})
    stages = elastic.pop("stages", ())
    losses = {"parent": (found.get("parent") or {}).get("loss", [])}
    router = found.get("router") or {}
    choices: Json = router.get("choices") or {}
    axes = list(dict.fromkeys(axis for sizes in choices.values() for axis in sizes))
    by_axis = {axis: {name: sizes.get(axis, []) for name, sizes in choices.items()} for axis in axes}
    small = [plot(axis, by_axis[axis], colors, height=110, hold=(0, full_size(report, axis))) for axis in axes]
    return {
        "elastic": plot("KL divergence from the parent, nats", elastic, colors, 240, log=True, hold=(0,), marks=stages),
        "parent": plot("Training loss of the parent, nats", losses, colors, log=True, hold=(0,)),
        "cost": plot("Router’s expected parameters ÷ target", router.get("expected") or {}, colors, hold=(1,), reference=1),
        "choices": [one for one in small if one],
    }


def full_size(report: Json, axis: str) -> float:
    members = (report.get("family") or {}).get("members") or [{"layers": []}]
    return max((layer["sizes"].get(axis, 0) for layer in members[0]["layers"]), default=0)


def family(report: Json, colors: Mapping[str, int]) -> Json | None:
    found = report.get("family") or {}
    if not found.get("members"):
        return None
    layers = found["members"][0]["layers"]
    columns = [column(layer, found, max(one["of"] for one in layers), colors) for layer in layers]
    kinds = [(kind, KINDS.get(kind, kind)) for kind in dict.fromkeys(layer["kind"] for layer in layers)]
    return {**found, "columns": columns, "kinds": kinds, "sizes": kept_sizes(found["members"])}


def column(full: Json, found: Json, largest: int, colors: Mapping[str, int]) -> Json:
    """One layer: per size the corner of its weights that is used, `hidden_size` wide and its own sizes high."""
    boxes: list[Json] = []
    said = []
    for member in found["members"]:
        layer = next((one for one in member["layers"] if one["index"] == full["index"]), {"kept": False})
        look = {"strength": colors[member["name"]], "kept": bool(layer["kept"])}
        if layer["kept"]:
            width = layer["sizes"]["hidden_size"] / found["parent"]["hidden_size"]
            height = own_size(layer) / own_size(full)
            boxes.append({"width": round(100 * width, 2), "height": round(100 * height, 2), **look})
        elif boxes and boxes[-1]["kept"]:
            boxes.append({**boxes[-1], **look})
        said.append(f"{member['name']}: {whole(layer['parameters']) + ' parameters' if layer['kept'] else 'dropped'}")
    title = f"Layer {full['index']}, {KINDS.get(full['kind'], full['kind'])}. {'; '.join(said)}."
    tall = round(max(full["of"] / largest, 0.1), 3)
    return {"index": full["index"], "kind": full["kind"], "title": title, "tall": tall, "boxes": boxes}


def own_size(layer: Json) -> int:
    return math.prod(size for axis, size in layer["sizes"].items() if axis != "hidden_size")


def kept_sizes(members: Sequence[Json]) -> list[tuple[str, list[str]]]:
    """Per axis, by its Hugging Face name, what each member keeps: one figure, or the range over its layers."""
    kept = [[layer["sizes"] for layer in member["layers"] if layer["kept"]] for member in members]
    table = [("layers", [str(len(layers)) for layers in kept])]
    for axis in dict.fromkeys(axis for layers in kept for layer in layers for axis in layer):
        found = [sorted({layer[axis] for layer in layers if axis in layer}) for layers in kept]
        table.append((axis, [BLANK.join(dict.fromkeys(whole(v) for v in (*r[:1], *r[-1:]))) or BLANK for r in found]))
    return table


def is_control(row: Json) -> bool:
    return row["role"] not in ("parent", "elastic")


def scatter(rows: Sequence[Json], colors: Mapping[str, int], height: int = 320) -> Json | None:
    """Exact match over parameters. A control's label stands left of a point in the left half, right of it elsewhere."""
    if not rows:
        return None
    x = fitted([0, *(row["parameters"] for row in rows)])
    y = fitted([100 * value for row in rows for value in (row["exact_match"], *row["interval"])])
    points: list[Json] = [
        {"row": row, "x": x.at(row["parameters"]), "y": y.top(100 * row["exact_match"]), "label": None,
         "whisker": [y.top(100 * bound) for bound in row["interval"]],
         "strength": colors.get(row["name"], 3), "left": x.at(row["parameters"]) < 58} for row in rows
    ]
    for left in (True, False):
        side = [point for point in points if is_control(point["row"]) and point["left"] == left]
        for point, label in zip(side, spread([point["y"] for point in side], 1600 / height), strict=True):
            point["label"] = label
    path = " ".join(f"{point['x']:g},{point['y']:g}" for point in points if point["row"]["role"] == "elastic")
    return {"height": height, "points": points, "path": path, "x_ticks": [(x.at(v), short(v)) for v in x.ticks(4)],
            "y_ticks": [(y.top(v), f"{v:g}%") for v in y.ticks(5)]}


def headline(report: Json) -> str:
    rows = report.get("rows", [])
    elastic = [row for row in rows if row["role"] == "elastic"]
    if not elastic:
        return str(report.get("title", "Nestling"))
    count = WORDS[len(elastic)] if len(elastic) < len(WORDS) else str(len(elastic))
    parent = [f", its parent {percent(row['exact_match'])}" for row in rows if row["role"] == "parent"]
    opening = f"One training run, {count} model{'s' if len(elastic) > 1 else ''}: the {elastic[-1]['name']} size"
    return f"{opening} solves {percent(elastic[-1]['exact_match'])} of held-out problems{''.join(parent)}."


def verdicts(rows: Sequence[Json]) -> list[tuple[bool, str]]:
    """For each elastic size with controls of its budget: does a control do as well (True), and what to say about it."""
    said = []
    for row in (row for row in rows if row["role"] == "elastic"):
        rivals = [r for r in rows if is_control(r) and (r.get("budget") or r["name"].split()[0]) == row["budget"]]
        rivals.sort(key=lambda rival: rival["exact_match"], reverse=True)
        better = [rival for rival in rivals if rival["exact_match"] >= row["exact_match"]]
        for rival in better:
            verb = "beats" if rival["exact_match"] > row["exact_match"] else "equals"
            said.append((True, f"{rival['name']} {verb} the elastic {row['name']} size: {against(rival, row)}"))
        if rivals and not better:
            said.append((False, f"The elastic {row['name']} size is ahead of {rivals[0]['name']}"
                         f"{', its closest control' if rivals[1:] else ''}: {against(row, rivals[0])}"))
    return said


def against(a: Json, b: Json) -> str:
    overlap = max(a["interval"][0], b["interval"][0]) <= min(a["interval"][1], b["interval"][1])
    note = ", and their 95% intervals overlap" if overlap else ""
    return f"{percent(a['exact_match'])} against {percent(b['exact_match'])}{note}."


@cache
def template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"percent": percent, "whole": whole, "short": short, "duration": duration}
    return page.from_string(files("nestling.evaluate").joinpath("report.html.j2").read_text("utf-8"))


def render(report: Json) -> str:
    """The whole page for a `report.json`: it works offline, in light and dark, on a phone and on paper."""
    colors, rows = strengths(report), report.get("rows", [])
    return template().render(
        report=report, headline=headline(report), rows=rows, colors=colors, verdicts=verdicts(rows),
        scatter=scatter(rows, colors), family=family(report, colors), curves=curves(report, colors),
    )


def terminal_table(report: Json) -> "Table":
    """The results table for a terminal: controls dim below a rule, the verdicts as its caption. Print it with rich."""
    from rich.table import Table
    from rich.text import Text

    rows = report.get("rows", [])
    caption = Text("\n".join(text for _, text in verdicts(rows)))
    table = Table(title=Text(headline(report)), caption=caption, title_justify="left", caption_justify="left")
    table.add_column("model")
    for name in ("exact match", "95% interval", "parameters", "weights", "tokens/s"):
        table.add_column(name, justify="right")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        ends = after is not None and is_control(after) and not is_control(row)
        interval = BLANK.join(percent(bound) for bound in row["interval"])
        cells = (percent(row["exact_match"]), interval, whole(row["parameters"]), short(row["bytes"], "B"))
        style = "dim" if is_control(row) else None
        table.add_row(Text(row["name"]), *cells, whole(row["tokens_per_second"]), end_section=ends, style=style)
    return table
