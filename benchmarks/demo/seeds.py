"""The demo over several seeds: exact match of every row, and paired differences with 95 % intervals.

    python benchmarks/demo/seeds.py --out out/demo-seeds --seeds 0 1 2 > benchmarks/demo/DATE.md

Each seed is a whole `nestling run runs/demo.toml`: another parent, another ranking, another held-out sample. Runs that
are done are not repeated; stopped ones go on. Differences are paired by problem: every row of a seed answers the same
1000 problems, and the interval is of the mean difference over all problems of all seeds (normal approximation).
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

PAIRS = [
    ("100%", "parent"),
    ("75%", "parent"),
    ("50%", "parent"),
    ("75%", "75% untrained"),
    ("50%", "50% untrained"),
    ("50%", "50% uniform"),
    ("50%", "50% from scratch"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo-seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="runs/demo.toml")
    given = parser.parse_args()
    runs = [given.out / str(seed) for seed in given.seeds]
    for seed, run in zip(given.seeds, runs, strict=True):
        command = [sys.executable, "-m", "nestling", "run", given.recipe, "--seed", str(seed), "--out", str(run)]
        subprocess.run(command, check=True)
    print(table([(read(run / "report.json"), answers(run)) for run in runs], sys.argv[1:]))


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def answers(run: Path) -> dict[str, dict[str, bool]]:
    """Row name -> prompt -> solved."""
    rows = read(run / "run.json")["rows"]
    judged = {row["name"]: read(run / row["evaluation"] / "evaluation.json")["outputs"] for row in rows}
    return {name: {output["prompt"]: output["correct"] for output in outputs} for name, outputs in judged.items()}


def table(seeds: list[tuple[dict[str, Any], dict[str, dict[str, bool]]]], arguments: list[str]) -> str:
    reports = [report for report, _ in seeds]
    first = reports[0]
    lines = [
        f"# The demo over {len(seeds)} seeds, {first['date']}",
        "",
        f"`python benchmarks/demo/seeds.py {' '.join(arguments)}` · {first['machine']} · "
        + ", ".join(f"{name} {number}" for name, number in first["versions"].items()),
        "",
        first["task"] + ".",
        "",
        "| row | parameters | "
        + " | ".join(f"seed {report['seed']}" for report in reports)
        + " | mean | spread (s.d.) |",
        "|---|---:|" + "---:|" * (len(seeds) + 2),
    ]
    for index, row in enumerate(first["rows"]):
        shares = [report["rows"][index]["exact_match"] for report in reports]
        counts = " / ".join(dict.fromkeys(f"{report['rows'][index]['parameters']:,}" for report in reports))
        spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
        cells = [
            row["name"],
            counts,
            *(f"{s:.1%}" for s in shares),
            f"{statistics.fmean(shares):.1%}",
            f"{100 * spread:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| difference, points | " + " | ".join(f"seed {r['seed']}" for r in reports) + " | all, 95 % interval |",
    ]
    lines.append("|---|" + "---:|" * (len(seeds) + 1))
    for one, other in PAIRS:
        differences = [paired(solved[one], solved[other]) for _, solved in seeds]
        low, mean, high = interval([value for values in differences for value in values])
        cells = [f"{100 * statistics.fmean(values):+.1f}" for values in differences]
        lines.append(f"| {one} − {other} | " + " | ".join(cells) + f" | {mean:+.1f} ({low:+.1f} … {high:+.1f}) |")
    lines += ["", "Seconds per stage: "]
    lines += [
        f"- seed {r['seed']}: "
        + ", ".join(f"{k} {v:.0f}" for k, v in r["seconds"].items())
        + f"; in all {sum(r['seconds'].values()):.0f}"
        for r in reports
    ]
    return "\n".join(lines)


def paired(one: dict[str, bool], other: dict[str, bool]) -> list[int]:
    assert one.keys() == other.keys(), "rows answered different problems"
    return [int(one[prompt]) - int(other[prompt]) for prompt in one]


def interval(differences: list[int]) -> tuple[float, float, float]:
    """(low, mean, high) in points."""
    mean = statistics.fmean(differences)
    error = 1.96 * statistics.stdev(differences) / len(differences) ** 0.5
    return 100 * (mean - error), 100 * mean, 100 * (mean + error)


if __name__ == "__main__":
    main()
