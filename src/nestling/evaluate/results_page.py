"""`nestling report` of evaluations: one self-contained page, and its tables in Markdown for a model card."""

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from nestling.errors import NestlingError
from nestling.evaluate.report import (
    BLANK,
    Scale,
    curves,
    family,
    fitted,
    percent,
    short,
    strengths,
    templates,
    whole,
)
from nestling.evaluate.results import Model, Results, Score, compare, front, gather
from nestling.evaluate.story import assemble, family_of
from nestling.weights.elastic import FILE, open_elastic
from nestling.weights.files import read_json, write_file_atomically

Json = dict[str, Any]
COSTS = {
    "parameters": "Parameters",
    "bytes": "Bytes of bf16 weights",
    "tokens_per_second": "Tokens per second, measured",
}
GENERATOR = "nestling report"


def write_page(paths: Sequence[Path], out: Path | None) -> tuple[Path, Path]:
    """Write the page and the Markdown beside it; returns both. One of the paths may be the output of nestling run."""
    runs = [path for path in paths if (path / "run.json").is_file()]
    evaluations = [path for path in paths if path not in runs]
    if len(runs) > 1 or not evaluations:
        raise NestlingError("name the --out directories of nestling eval, and at most one output of nestling run")
    results = gather(evaluations)
    page = out or (evaluations[0] if evaluations[0].is_dir() else evaluations[0].parent) / "report.html"
    if page.suffix != ".html":
        raise NestlingError(f"{page}: the page to write must end in .html")
    _check_ours(page)
    told = assemble(runs[0]) if runs else _alone(results)
    write_file_atomically(page, render(results, told).encode())
    card = page.with_suffix(".md")
    write_file_atomically(card, markdown(results, _sidecar(results)).encode())
    return page, card


def _check_ours(page: Path) -> None:
    if page.exists() and GENERATOR not in page.read_text("utf-8", errors="replace")[:2000]:
        raise NestlingError(f"{page}: exists and is not a page of nestling report; choose another --out")


def _alone(results: Results) -> Json:
    """What is known of the family without its run: its sizes, if its directory is still there."""
    there = results.directory is not None and (results.directory / FILE).is_file()
    return {"family": family_of(open_elastic(results.directory)) if there and results.directory else None}


def _sidecar(results: Results) -> Json:
    file = None if results.directory is None else results.directory / FILE
    return read_json(file) if file is not None and file.is_file() else {}


def render(results: Results, told: Json) -> str:
    """The whole page. told: of a run, as report.json, or only its family."""
    colors = strengths(told) or _strengths(results)
    plots = [plot for cost in COSTS if (plot := tradeoff(results, cost, colors))]
    return templates().get_template("results.html.j2").render(
        title=_title(results),
        headline=headline(results),
        report=told,
        results=results,
        colors=colors,
        plots=plots,
        compare=compare(results, _sidecar(results)),
        family=family(told, colors),
        curves=curves(told, colors),
        generator=GENERATOR,
        date=date.today().isoformat(),
        protocols=protocols(results),
        figure=figure,
        blank=BLANK,
        missed=missed,
    )  # fmt: skip


def _strengths(results: Results) -> dict[str, int]:
    return strengths({"rows": [{"name": model.name, "role": "elastic"} for model in results.family]})


def _title(results: Results) -> str:
    return results.directory.resolve().name if results.directory else results.models[0].name


def headline(results: Results) -> str:
    family = results.family
    scored = [(model, score) for model in family if (score := results.average(model))]
    if len(scored) < 2:
        return f"{_title(results)}: {len(results.tasks)} task{'s' * (len(results.tasks) > 1)} evaluated"
    (large, high), (small, low) = scored[0], scored[-1]
    sizes = f"{len(family)} sizes in one checkpoint"
    return f"{sizes}: {small.name} scores {percent(low[0])}, {large.name} {percent(high[0])}"


def figure(task: str, results: Results, score: Score | None) -> tuple[str, str]:
    """A score and half the width of its interval, as a table shows them."""
    if score is None:
        return BLANK, ""
    value, low, high = score
    reading = any(m.results[task]["result"]["metric"] == "perplexity" for m in results.models if task in m.results)
    half = (high - low) / 2
    if reading:
        return f"{value:,.{_digits(value)}f}", f"± {half:,.{_digits(value)}f}"
    return f"{100 * value:.1f}", f"± {100 * half:.1f}"


def _digits(value: float) -> int:
    return 3 if value < 100 else 0


def missed(model: Model) -> str:
    """Answers that could not be read, and those cut off at the token limit."""
    counts = [
        (sum(r["result"].get(key, 0) for r in model.results.values()), words)
        for key, words in (("no_answer", "without an answer"), ("cut_off", "cut off"))
    ]
    return ", ".join(f"{whole(count)} {words}" for count, words in counts if count)


def tradeoff(results: Results, cost: str, colors: dict[str, int], height: int = 280) -> Json | None:
    """Average score against a cost: points with whiskers, and the front that no model beats in both."""
    shown = [
        (model, float(value), score)
        for model in results.models
        if (value := getattr(model, cost)) and (score := results.average(model))
    ]
    if not shown:
        return None
    values, more = [value for _, value, _ in shown], cost == "tokens_per_second"
    x = fitted(values, log=True) if max(values) > 20 * min(values) else fitted([0, *values])
    y = fitted([min(100.0, max(0.0, 100 * end)) for _, _, score in shown for end in score])
    points = [_point(model, x.at(value), score, y, colors) for model, value, score in shown]
    _label(points, height)
    best = front([(value, score[0]) for _, value, score in shown], more=more)
    return {
        "title": COSTS[cost],
        "height": height,
        "points": points,
        "front": sorted((points[place]["x"], points[place]["y"]) for place in best),
        "x_ticks": [(x.at(v), short(v, "B" if cost == "bytes" else "")) for v in x.ticks(3)],
        "y_ticks": [(y.top(v), f"{v:g}%") for v in y.ticks(5)],
    }


def _point(model: Model, left: float, score: Score, y: Scale, colors: dict[str, int]) -> Json:
    said = f"{model.name}: {percent(score[0])}, 95% interval {percent(score[1])} to {percent(score[2])}"
    return {
        "name": model.name if len(model.name) <= 22 else f"{model.name[:21]}…",
        "said": said,
        "x": left,
        "y": y.top(100 * score[0]),
        "whisker": [y.top(100 * score[1]), y.top(100 * score[2])],
        "strength": colors.get(model.name, 3) if model.member else 4,
    }


def _label(points: Sequence[Json], height: int) -> None:
    """Give each point a free place for its name: above its whisker, below it, or on either side."""
    taken: list[tuple[float, float, float]] = []  # centre, top, half a width: in percent of the plot
    line = 1500 / height
    for point in sorted(points, key=lambda point: point["x"]):
        half, (low, high) = 1.6 * len(point["name"]) + 1, point["whisker"]
        middle = min(max(point["x"], half - 4), 104 - half)
        beside = [(point["x"] + side * (half + 3), point["y"] + shift) for shift in (0, -line) for side in (-1, 1)]
        tries = [(middle, high - line / 2), (middle, low + 0.7 * line), *beside]
        free = (
            (x, y)
            for x, y in tries
            if y <= 97 and all(abs(y - top) >= line or abs(x - centre) >= half + wide for centre, top, wide in taken)
        )
        place = next(free, tries[0])
        taken.append((*place, half))
        point["label"] = (round(place[0], 2), round(place[1], 2))


def protocols(results: Results) -> list[tuple[str, str]]:
    """Per task how it was asked, drawn and judged."""
    told = []
    for task in results.tasks:
        settings = next(model.results[task]["settings"] for model in results.models if task in model.results)
        parts = [f"{settings[key]:,} {key}" for key in ("problems", "documents") if key in settings]
        if sampling := settings.get("sampling"):
            drawn = (
                f"temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}"
                if sampling["temperature"]
                else "greedy"
            )
            parts += [
                f"{settings['samples']} answer{'s' * (settings['samples'] > 1)} each",
                drawn,
                f"at most {sampling['max_tokens']:,} tokens",
            ]
        parts += (
            [f"windows of {settings['window']:,} tokens, {settings['stride']:,} new in each"]
            if "window" in settings
            else []
        )
        told.append((task, "; ".join([*parts, settings["scorer"]])))
    return told


def markdown(results: Results, sidecar: Json) -> str:
    """Scores, the Compare table and the protocol, to be put into a model card."""
    head = ["model", "parameters", *results.tasks, *(["average"] if results.averaged else [])]
    rows = [
        [
            model.name,
            whole(model.parameters),
            *(" ".join(figure(t, results, model.score(t))).strip() for t in results.tasks),
        ]
        + ([_mean(results.average(model))] if results.averaged else [])
        for model in results.models
    ]
    systems = [_saved(row) for row in compare(results, sidecar)]
    told = [f"- {task}: {how}" for task, how in protocols(results)]
    made = f"{', '.join(results.every('date'))}; {'; '.join(results.every('machine'))}"
    return "\n".join(
        ["## Evaluation", "", *_table(head, rows), "", "± is half of the 95 % interval.", ""]
        + _table(["system", "sizes", "average score", "tokens", "bf16 memory"], systems)
        + ["", *told, "", f"Measured {made}."]
    ) + "\n"  # fmt: skip


def _saved(row: Json) -> list[str]:
    sizes, averages = ", ".join(map(short, row["sizes"])), " / ".join(map(percent, row["averages"]))
    return [row["system"], sizes, averages, short(row["tokens"]), short(row["bytes"], "B")]


def _mean(score: Score | None) -> str:
    return BLANK if score is None else f"{100 * score[0]:.1f} ± {50 * (score[2] - score[1]):.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    ruler = "|".join(["---", *["---:"] * (len(head) - 1)])
    return (
        [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in (head,)]
        + [f"|{ruler}|"]
        + [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
