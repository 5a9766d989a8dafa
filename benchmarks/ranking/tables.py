"""The study's figures as tables: means over seeds, and how many random orders each metric beats."""

import math
import platform
import statistics
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

Rows = list[dict[str, Any]]


def report(rows: Rows, arguments: str) -> str:
    seeds = sorted({row["seed"] for row in rows})
    parts = [_head(rows, seeds, arguments), "## Widths", _overall(rows, seeds)]
    widths = [row for row in rows if row["kind"] == "width"]
    for axis in dict.fromkeys(row["axis"] for row in widths):
        parts += [f"### {axis}", _axis([row for row in widths if row["axis"] == axis], seeds)]
    return "\n\n".join([*parts, "## Layers", _depth(rows, seeds), "## How many samples", _samples(rows)])


def _head(rows: Rows, seeds: list[int], arguments: str) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "reasoning-gym"))
    lines = [
        f"# Which metric ranks best: {len(seeds)} parents of runs/demo.toml",
        "",
        f"`python benchmarks/ranking/study.py {arguments}` · {platform.processor() or platform.machine()}, "
        f"{platform.system()}, Python {platform.python_version()}, {versions}",
        "",
        "| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "|---|" + "---:|" * len(seeds),
    ]
    for name, figure in (("parent", "exact"), ("parent", "ce"), ("uniform guess", "kl")):
        of_seed = {row["seed"]: row[figure] for row in rows if row["kind"] == "parent" and row["metric"] == name}
        label = {"exact": "exact match", "ce": "cross-entropy", "kl": "KL from the parent"}[figure]
        cells = (f"{of_seed[seed]:.1%}" if figure == "exact" else f"{of_seed[seed]:.3f}" for seed in seeds)
        lines.append(f"| {name}, {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _family(row: dict[str, Any]) -> str:
    return "random" if row["metric"].startswith("random") else row["metric"]


def _mean(rows: Iterable[dict[str, Any]], figure: str) -> float:
    return statistics.fmean(row[figure] for row in rows)


def _pick(rows: Rows, **what: Any) -> Rows:
    return [row for row in rows if all((_family(row) if k == "metric" else row.get(k)) == v for k, v in what.items())]


def _beaten(rows: Rows, metric: str, figure: str = "kl") -> str:
    """Random draws of the same seed that are further from the parent than the metric's order."""
    pairs = [(row[figure], other[figure]) for row in _pick(rows, metric=metric)
             for other in _pick(rows, metric="random", seed=row["seed"])]  # fmt: skip
    return f"{sum(one < other for one, other in pairs)}/{len(pairs)}" if pairs else ""


def _axis(rows: Rows, seeds: list[int]) -> str:
    shares = list(dict.fromkeys(row["share"] for row in rows))
    lines = ["| metric | " + " | ".join(f"{s}: KL | cross-entropy | exact | random beaten" for s in shares) + " |"]
    lines.append("|---|" + "---:|" * 4 * len(shares))
    first = [row for row in rows if row["share"] == shares[-1]]
    names = sorted({_family(row) for row in rows}, key=lambda name: _mean(_pick(first, metric=name), "kl"))
    for name in names:
        cells = [name]
        for share in shares:
            own, here = _pick(rows, metric=name, share=share), [row for row in rows if row["share"] == share]
            spread = statistics.stdev(row["kl"] for row in own) if len(own) > 1 else 0.0
            cells.append(f"{_mean(own, 'kl'):.4f} ± {spread:.4f}")
            cells += [f"{_mean(own, 'ce'):.3f}", f"{_mean(own, 'exact'):.1%}"]
            cells.append("" if name == "random" else _beaten(here, name))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _overall(rows: Rows, seeds: list[int]) -> str:
    """Per axis: the geometric mean over seeds and cuts of KL over the mean KL of the random orders."""
    widths = [row for row in rows if row["kind"] == "width"]
    axes = list(dict.fromkeys(row["axis"] for row in widths))
    lines = ["KL as a share of what random orders cost: geometric mean over seeds and cuts, usable cuts only "
             "(the best metric is closer to the parent than a uniform guess).", ""]  # fmt: skip
    lines += ["| metric | " + " | ".join(axes) + " |", "|---|" + "---:|" * len(axes)]
    guess = {row["seed"]: row["kl"] for row in rows if row.get("metric") == "uniform guess"}
    for name in dict.fromkeys(_family(row) for row in widths if _family(row) != "random"):
        cells = [_ratio([row for row in widths if row["axis"] == axis], name, guess) for axis in axes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(rows: Rows, metric: str, guess: dict[int, float]) -> str:
    logs = []
    for row in _pick(rows, metric=metric):
        same = _pick(rows, share=row["share"], seed=row["seed"])
        if min(other["kl"] for other in same if _family(other) != "random") < guess[row["seed"]]:
            logs.append(math.log(max(row["kl"], 1e-9) / _mean(_pick(same, metric="random"), "kl")))
    return f"{math.exp(statistics.fmean(logs)):.3f}" if logs else ""


def _depth(rows: Rows, seeds: list[int]) -> str:
    rows = [row for row in rows if row["kind"] == "depth"]
    dropped = sorted({row["dropped"] for row in rows})
    lines = [
        "| layers chosen by | " + " | ".join(f"{n} of 7 dropped: KL | exact | random beaten" for n in dropped) + " |"
    ]
    lines.append("|---|" + "---:|" * 3 * len(dropped))
    for name in ("iterative", "one-shot", "cosine", "random"):
        cells = [name]
        for count in dropped:
            own = _pick(rows, metric=name, dropped=count)
            cells += [f"{_mean(own, 'kl'):.3f}", f"{_mean(own, 'exact'):.1%}"]
            cells.append("" if name == "random" else _beaten([r for r in rows if r["dropped"] == count], name))
        lines.append("| " + " | ".join(cells) + " |")
    best = [
        [min(_pick(rows, metric="every set", dropped=n, seed=seed), key=lambda row: row["kl"]) for seed in seeds]
        for n in dropped
    ]
    cells = [f"{_mean(own, 'kl'):.3f} | {_mean(own, 'exact'):.1%} | " for own in best]
    return "\n".join([*lines, "| the best set there is | " + " | ".join(cells) + " |"])


def _samples(rows: Rows) -> str:
    """Spearman with the scores of 4096 other problems, mean and worst over layers, draws and seeds."""
    rows = [row for row in rows if row["kind"] == "samples"]
    keys: dict[str, Callable[[str], bool]] = {
        "hidden": lambda key: key == "d",
        "ffn": lambda key: key.startswith("f."),
        "mamba heads": lambda key: key.startswith("h."),
        "mamba channels": lambda key: key.startswith("p."),
        "attention heads": lambda key: key.startswith("q."),
        "layers": lambda key: key == "layers",
    }
    lines = ["| samples | " + " | ".join(keys) + " | KL of all axes at 90 % |", "|---|" + "---:|" * (len(keys) + 1)]
    for count in sorted({row["samples"] for row in rows}):
        own, cells = [row for row in rows if row["samples"] == count], [str(count)]
        for wanted in keys.values():
            values = [value for row in own for key, value in row["spearman"].items() if wanted(key)]
            cells.append(f"{statistics.fmean(values):.3f} (worst {min(values):.2f})")
        lines.append("| " + " | ".join([*cells, f"{_mean(own, 'kl'):.4f}"]) + " |")
    return "\n".join(lines)
