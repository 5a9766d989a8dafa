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

from nestling.errors import NestlingError
from nestling.evaluate.measures import EXACT_MATCH, measure_of

if TYPE_CHECKING:
    from jinja2 import Environment
    from rich.table import Table

Json = dict[str, Any]
KINDS = {"M": "Mamba-2", "*": "attention", "-": "MLP", "E": "mixture of experts"}
WORDS = {1: "one model", 2: "two models", 3: "three models", 4: "four models", 5: "five models"}
BLANK = "–"


def percent(share: float | None) -> str:
    return BLANK if share is None else f"{100 * share:.1f}%"


def whole(number: float | None) -> str:
    return BLANK if number is None else f"{number:,.0f}"


def short(number: float | None, unit: str = "") -> str:
    """Three figures and a prefix: `712 k`, `8.89 B`, and of bytes `1.42 MB`, `17.8 GB`."""
    if number is None:
        return BLANK
    power = min(int(math.log10(max(float(f"{number:.3g}"), 1)) + 1e-9) // 3, 4)
    prefix = ("", "k", "M", "G" if unit else "B", "T")[power]
    return f"{number / 1000**power:.3g} {prefix}{unit}".rstrip()


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    long = f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    return long if minutes else f"{seconds:.1f} s"


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` laid out from 0 to 100, evenly or by their logarithm; others lie at the ends."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        held = min(max(value, self.low), self.high)
        low, high, here = (math.log(x) if self.log else x for x in (self.low, self.high, held))
        return round(100 * (here - low) / (high - low or 1), 2)

    def top(self, value: float) -> float:
        return round(100 - self.at(value), 2)

    def ticks(self, count: int) -> list[float]:
        """Round values within the scale, about `count` of them on a linear one."""
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
    """A scale for these values: a linear one ends on round numbers, a logarithmic one spans at most four decades."""
    low, high = min(values), max(values)
    if log:
        return Scale(max(low, high / 1e4) * 0.9, high * 1.1, log=True)
    step = round_step(high - low or abs(high) or 1.0, 4)
    low = step * math.floor(low / step + 1e-9)
    return Scale(low, max(step * math.ceil(high / step - 1e-9), low + step))


def thinned(points: Iterable[Sequence[float | None]], limit: int = 200) -> tuple[list[tuple[float, float]], int]:
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
    title: str,
    series: Mapping[str, Sequence],
    colors: Mapping[str, int],
    height: int = 190,
    log: bool = False,
    hold: Sequence[float] = (),
    marks: Sequence = (),
    reference: float | None = None,
) -> Json | None:
    """What the template needs to draw a line per series over training steps; None where there is nothing to draw.

    The y scale is `log` where the values span a decade, else it has them and those of `hold`; a low plot shows its ends
    only. `marks` are (step, text); `reference` is a value drawn as a line across.
    """
    drawn = {name: thinned(points) for name, points in series.items()}
    drawn = {name: found for name, found in drawn.items() if found[0]}
    if not drawn:
        return None
    steps, values = zip(*(point for points, _ in drawn.values() for point in points), strict=True)
    log, low, held = log and max(values) > max(10 * min(values), 0), height <= 100, [*values, *hold]
    y = fitted(values, log=True) if log else Scale(min(held), max(held)) if low else fitted(held)
    x = Scale(min(0, *steps), max(1, *steps))
    lines: list[Json] = [
        {
            "name": name,
            "strength": colors.get(name, 3),
            "points": [(x.at(step), y.top(v)) for step, v in points],
            "last": f"{points[-1][1]:.3g}",
        }
        for name, (points, _) in drawn.items()
    ]
    return {
        "title": title,
        "height": height,
        "run": max(run for _, run in drawn.values()),
        "log": log,
        "cut": log and y.low > min(values),
        "lines": list(zip(lines, spread([line["points"][-1][1] for line in lines], 1400 / height), strict=True)),
        "x_ticks": [(x.at(v), f"{v:,g}") for v in x.ticks(2 if low else 5)],
        "y_ticks": [(y.top(v), f"{v:,g}") for v in ((y.low, y.high) if low else y.ticks(4))],
        "marks": [(x.at(step), step, text) for step, text in marks if x.low <= step <= x.high],
        "reference": None if reference is None else y.top(reference),
    }


def curves(report: Json, colors: Mapping[str, int]) -> Json:
    found = report.get("curves") or {}
    elastic = dict(found.get("elastic") or {})
    stages = elastic.pop("stages", ())
    losses, router = {"parent": (found.get("parent") or {}).get("loss", [])}, found.get("router") or {}
    expected, chosen = router.get("expected") or {}, router.get("choices") or {}
    return {
        "elastic": plot("KL divergence from the parent, nats", elastic, colors, 260, log=True, hold=(0,), marks=stages),
        "parent": plot("Training loss of the parent, nats", losses, colors, log=True, hold=(0,)),
        "cost": plot("Router’s expected cost ÷ target", expected, colors, hold=(1,), reference=1),
        "choices": choices(chosen, report, colors),
    }


def choices(chosen: Mapping[str, Json], report: Json, colors: Mapping[str, int]) -> list[Json | None]:
    """One small plot per axis: the size the router expects to pick for each budget, from 0 to the parent's size."""
    members: Sequence[Json] = (report.get("family") or {}).get("members") or [{"layers": []}]
    small = []
    for field in dict.fromkeys(axis.partition("@")[0] for sizes in chosen.values() for axis in sizes):
        full = max((layer["sizes"].get(field, 0) for layer in members[0]["layers"]), default=0)
        series = {name: averaged(sizes, field) for name, sizes in chosen.items()}
        small.append(plot(field, series, colors, 100, hold=(0, full)))
    return small


def averaged(sizes: Mapping[str, Sequence[Sequence[float]]], field: str) -> list[list[float]]:
    """(step, size) points of a field; their mean over layers where it has a size per layer: `intermediate_size@3`."""
    curves = [points for axis, points in sizes.items() if axis.partition("@")[0] == field]
    return [[at[0][0], fmean(size for _, size in at)] for at in zip(*curves, strict=True)]


def family(report: Json, colors: Mapping[str, int]) -> Json | None:
    found = report.get("family") or {"members": []}
    layers: list[Json] = next((member["layers"] for member in found["members"]), [])
    columns = [column(layer, found, max(one["of"] for one in layers), colors) for layer in layers]
    return {**found, "columns": columns, "sizes": kept_sizes(found["members"])} if columns else None


def column(full: Json, found: Json, largest: int, colors: Mapping[str, int]) -> Json:
    """One layer: per size the corner of its weights that is used, `hidden_size` wide and its own sizes high."""
    boxes: list[Json] = []
    kept: list[tuple[str, int | None]] = []
    for member in found["members"]:
        layer: Json = next((one for one in member["layers"] if one["index"] == full["index"]), {"kept": False})
        look: Json = {"strength": colors[member["name"]], "kept": layer["kept"]}
        if layer["kept"]:
            width = layer["sizes"]["hidden_size"] / found["parent"]["hidden_size"]
            height = math.prod(v / full["sizes"][axis] for axis, v in layer["sizes"].items() if axis != "hidden_size")
            boxes.append({"width": round(100 * width, 2), "height": round(100 * height, 2), **look})
        elif boxes and boxes[-1]["kept"]:
            boxes.append({**boxes[-1], **look})
        kept.append((member["name"], layer["parameters"] if layer["kept"] else None))
    tall, named = round(max(full["of"] / largest, 0.1), 3), KINDS.get(full["kind"], full["kind"])
    return {"index": full["index"], "kind": full["kind"], "named": named, "tall": tall, "boxes": boxes, "kept": kept}


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


def scatter(rows: Sequence[Json], height: int = 320) -> Json | None:
    """What rows are judged by over parameters. A control's label stands on the side that has more room."""
    if not rows:
        return None
    measure = measure_of(rows)
    x = fitted([0, *(row["parameters"] for row in rows)])
    y = fitted([value for row in rows for value in (measure.of(row), *measure.ends(row))])
    points: list[Json] = [
        {
            "row": row,
            "x": x.at(row["parameters"]),
            "y": y.top(measure.of(row)),
            "label": None,
            "whisker": [y.top(end) for end in measure.ends(row)],
            "left": x.at(row["parameters"]) < 58,
        }
        for row in rows
    ]
    for side in ([p for p in points if is_control(p["row"]) and p["left"] == left] for left in (True, False)):
        for point, label in zip(side, spread([point["y"] for point in side], 1600 / height), strict=True):
            point["label"] = label
    return {
        "height": height,
        "points": points,
        "x_ticks": [(x.at(v), short(v)) for v in x.ticks(4)],
        "y_ticks": [(y.top(v), f"{v:g}{measure.unit}") for v in y.ticks(5)],
    }


def headline(report: Json) -> str:
    rows = report.get("rows", [])
    elastic = [row for row in rows if row["role"] == "elastic"]
    measure = measure_of(rows)
    parent = [f", its parent {measure.say(row)}" for row in rows if row["role"] == "parent"]
    if not elastic:
        return str(report.get("title", "Nestling"))
    opening = f"One training run, {WORDS.get(len(elastic), f'{len(elastic)} models')}: the {elastic[-1]['name']} size"
    found = measure.say(elastic[-1])
    said = f"solves {found} of held-out problems" if measure is EXACT_MATCH else f"has a held-out perplexity of {found}"
    return f"{opening} {said}{''.join(parent)}."


def verdicts(rows: Sequence[Json]) -> list[tuple[bool, str]]:
    """For each elastic size with controls of its budget: does a control do better (True), and what to say about it."""
    said, rank = [], measure_of(rows).rank
    for row in (one for one in rows if one["role"] == "elastic"):
        rivals = [r for r in rows if is_control(r) and (r.get("budget") or r["name"].split()[0]) == row["budget"]]
        rivals.sort(key=rank, reverse=True)
        better = [rival for rival in rivals if rank(rival) >= rank(row)]
        for rival in better:
            ahead = rank(rival) > rank(row)
            verb = "beats" if ahead else "equals"
            said.append((ahead, f"{rival['name']} {verb} the elastic {row['name']} size: {against(rival, row)}"))
        for best in rivals[: not better]:
            which = f"{best['name']}{', its closest control' if rivals[1:] else ''}"
            said.append((False, f"The elastic {row['name']} size is ahead of {which}: {against(row, best)}"))
    return said


def against(a: Json, b: Json) -> str:
    measure = measure_of([a, b])
    (a_low, a_high), (b_low, b_high) = measure.ends(a), measure.ends(b)
    overlap = a_low <= b_high and b_low <= a_high
    said = f"{measure.say(a)} against {measure.say(b)}"
    return said + (", and their 95% intervals overlap." if overlap else ".")


@cache
def templates() -> "Environment":
    """Every page and part of one, by the name of its file."""
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    except ImportError:
        raise NestlingError("the report needs jinja2: pip install 'nestling[demo]'") from None
    parts = FunctionLoader(lambda name: files("nestling.evaluate").joinpath(name).read_text("utf-8"))
    pages = Environment(loader=parts, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"percent": percent, "whole": whole, "short": short, "duration": duration}
    return pages


def render(report: Json) -> str:
    """The whole page for a `report.json`: it works offline, in light and dark, on a phone and on paper."""
    colors, rows = strengths(report), report.get("rows", [])
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            report=report,
            headline=headline(report),
            rows=rows,
            colors=colors,
            verdicts=verdicts(rows),
            measure=measure_of(rows),
            scatter=scatter(rows),
            family=family(report, colors),
            curves=curves(report, colors),
        )
    )


def terminal_table(report: Json) -> "Table":
    """The results table for a terminal: controls dim below a rule, the verdicts as its caption. Print it with rich."""
    from rich.table import Table
    from rich.text import Text

    rows = report.get("rows", [])
    caption = Text("\n".join(text for _, text in verdicts(rows)))
    table = Table("model", title=Text(headline(report)), caption=caption, title_justify="left", caption_justify="left")
    measure = measure_of(rows)
    for name in (measure.name.lower(), "95% interval", "parameters", "weights", "tokens/s"):
        table.add_column(name, justify="right")
    for control in (False, True):
        for row in (row for row in rows if is_control(row) == control):
            interval = BLANK.join(measure.interval(row))
            cells = (measure.say(row), interval, whole(row["parameters"]), short(row["bytes"], "B"))
            table.add_row(Text(row["name"]), *cells, whole(row["tokens_per_second"]), style="dim" if control else None)
        table.add_section()
    return table
