"""Results of `nestling eval`, gathered: models, their tasks, averages with intervals, and what a family costs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

from nestling.errors import NestlingError
from nestling.weights.files import read_json

Json = dict[str, Any]
Score = tuple[float, float, float]
"""A score, and the ends of its 95 % interval."""


@dataclass(frozen=True)
class Model:
    """One evaluated model: a size of the family, or a baseline beside it."""

    name: str
    directory: str
    about: Mapping[str, Any]
    member: bool  # of the family
    results: Mapping[str, Json] = field(repr=False)

    @property
    def parameters(self) -> int:
        return int(self.about["parameters"])

    @property
    def bytes(self) -> int:
        return int(self.about["bytes"])

    @property
    def tokens_per_second(self) -> float | None:
        """Measured while it wrote: tokens over seconds, over all its tasks."""
        pairs = [
            (r["result"]["tokens"], r["result"]["tokens_per_second"]) for r in self.results.values() if _written(r)
        ]
        return sum(tokens for tokens, _ in pairs) / sum(tokens / rate for tokens, rate in pairs) if pairs else None

    def score(self, task: str) -> Score | None:
        """A task's share of right answers, or perplexity."""
        if task not in self.results:
            return None
        found = self.results[task]["result"]
        low, high = found["interval"] or (found["score"], found["score"])
        return found["score"], low, high


def _written(result: Json) -> bool:
    return result["result"]["metric"] == "pass@1" and bool(result["result"]["tokens_per_second"])


@dataclass(frozen=True)
class Results:
    """Everything that a page tells of."""

    models: Sequence[Model]  # the family largest first, then baselines
    tasks: Sequence[str]

    @property
    def family(self) -> list[Model]:
        return [model for model in self.models if model.member]

    @property
    def directory(self) -> Path | None:
        """Of the family."""
        return Path(self.family[0].directory) if self.family else None

    @property
    def averaged(self) -> list[str]:
        """Tasks that an average is over: those with a share of right answers, which every model has."""
        return [
            task
            for task in self.tasks
            if all(
                task in model.results and model.results[task]["result"]["metric"] != "perplexity"
                for model in self.models
            )
        ]

    def average(self, model: Model) -> Score | None:
        """The mean over tasks; its interval takes the tasks' errors as independent."""
        scores = [score for task in self.averaged if (score := model.score(task))]
        if not scores:
            return None
        mean = fmean(score for score, _, _ in scores)
        below = sqrt(sum((score - low) ** 2 for score, low, _ in scores)) / len(scores)
        above = sqrt(sum((high - score) ** 2 for score, _, high in scores)) / len(scores)
        return mean, mean - below, mean + above

    def every(self, key: str) -> list[str]:
        """The distinct values of a key over all results, in order."""
        return list(dict.fromkeys(str(r[key]) for model in self.models for r in model.results.values() if r.get(key)))


def gather(paths: Iterable[Path]) -> Results:
    """Read every result below these directories, or these files."""
    found = [read_json(file) for path in paths for file in _files(path)]
    found = [result for result in found if result.get("format") == 1 and {"task", "model", "result"} <= result.keys()]
    if not found:
        raise NestlingError("there are no results of nestling eval there; name its --out")
    grouped: dict[tuple[str, str, str], list[Json]] = {}
    for result in found:
        model = result["model"]
        grouped.setdefault((model["directory"], model["backend"], model["name"]), []).append(result)
    home = _family_directory(grouped)
    models = [
        Model(name, directory, rows[0]["model"], _is_member(rows[0]["model"], home), _by_task(rows))
        for (directory, _, name), rows in grouped.items()
    ]
    models.sort(key=lambda model: (not model.member, -model.parameters))
    return Results(models, list(dict.fromkeys(result["task"] for result in found)))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.rglob("*.json"))
    if not path.exists():
        raise NestlingError(f"{path}: no such directory or file")
    return [path]


def _by_task(rows: Sequence[Json]) -> dict[str, Json]:
    """The newest result of each task."""
    return {row["task"]: row for row in sorted(rows, key=lambda row: (row["date"], row.get("time", "")))}


def _family_directory(grouped: Mapping[tuple[str, str, str], Any]) -> str | None:
    """The directory of which most sizes were evaluated."""
    counts: dict[str, int] = {}
    for directory, backend, _ in grouped:
        counts[directory] = counts.get(directory, 0) + (backend == "nestling")
    return max(counts, key=lambda directory: counts[directory], default=None)


def _is_member(model: Json, home: str | None) -> bool:
    return model["directory"] == home and model["backend"] == "nestling"


def front(points: Sequence[tuple[float, float]], *, more: bool = False) -> list[int]:
    """Places of the points that none beats in both: least cost (or `more` of it) and highest score, cheapest first."""
    order = sorted(range(len(points)), key=lambda i: ((-1 if more else 1) * points[i][0], -points[i][1]))
    kept: list[int] = []
    for place in order:
        if not kept or points[place][1] > points[kept[-1]][1]:
            kept.append(place)
    return kept


def compare(results: Results, sidecar: Mapping[str, Any]) -> list[Json]:
    """The Compare table: systems, sizes, averages, tokens that made the sizes, bf16 bytes. The family is one system."""
    family = sorted(results.family, key=lambda model: model.parameters)
    average: Callable[[Model], float | None] = lambda model: (results.average(model) or (None,))[0]  # noqa: E731
    rows = []
    if family:
        apart = sum(model.bytes for model in family)
        rows.append(
            _system(results.directory.resolve().name if results.directory else "", family, average, tokens_of(sidecar))
        )
        rows[0]["bytes"] = max(model.bytes for model in family)
        if len(family) > 1:
            rows.append({**rows[0], "system": "the same sizes, each in its own file", "bytes": apart, "tokens": None})
    return rows + [_system(model.name, [model], average, None) for model in results.models if not model.member]


def _system(name: str, models: Sequence[Model], average: Callable[[Model], float | None], tokens: int | None) -> Json:
    return {
        "system": name,
        "sizes": [model.parameters for model in models],
        "averages": [average(model) for model in models],
        "tokens": tokens,
        "bytes": sum(model.bytes for model in models),
    }


def tokens_of(sidecar: Mapping[str, Any]) -> int | None:
    """Tokens of the elastic run: what its teacher read, else what the size that read most did."""
    trained = (sidecar.get("provenance") or {}).get("trained_tokens") or {}
    budgets = [budget.get("tokens", 0) for budget in (sidecar.get("budgets") or {}).values()]
    return trained.get("teacher") or max(budgets, default=0) or None
