"""`nestling eval` of every size by view, against the same evaluation of its slice in stock transformers.

    OMP_NUM_THREADS=1 python benchmarks/evaluate/throughput.py out/demo/elastic

One process, float32, greedy. A round runs, in turn, the same problems through both backends at the same batch; the
rate is what the result says (tokens over the seconds in which they were written), the ratio is taken within a round:
median (minimum … maximum). Answers that differ are counted. The load is the system's over the last minute, at the end.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path

import torch
import transformers

import nestling
from nestling.evaluate.evaluation import Evaluation, make_tasks
from nestling.evaluate.spec import parse_tasks
from nestling.evaluate.subject import Subject, open_subjects
from nestling.evaluate.suite import Overrides

TASK = "chain_sum:min_terms=2,max_terms=3,max_digits=2"


def evaluated(subject: Subject, options: argparse.Namespace, out: Path) -> tuple[float, list[str]]:
    """(tokens per second, answers)."""
    given = Overrides(problems=options.problems, max_tokens=options.tokens)
    tasks = make_tasks(parse_tasks([options.task]), given, 0)
    (result,) = Evaluation(tasks, [subject], out, options.batch, 0, overwrite=True).run(lambda _: None)
    (file,) = out.rglob("*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    records.sort(key=lambda record: record["item"])
    return result["result"]["tokens_per_second"], [record["generated"] for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--task", default=TASK)
    options = parser.parse_args()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    print(f"{versions}, {torch.get_num_threads()} threads, batch {options.batch}, {options.rounds} rounds\n")
    print("| size | ours, tokens/s | transformers | ratio | answers that differ |\n|---|---:|---:|---:|---:|")
    for size in nestling.load(options.directory):
        with tempfile.TemporaryDirectory() as directory:
            row(size, options, Path(directory))
    print(f"\nload {os.getloadavg()[0]:.1f}")


def row(size: str, options: argparse.Namespace, directory: Path) -> None:
    nestling.slice(options.directory, size, directory / "cut")
    (ours,) = open_subjects(options.directory, [size])
    (theirs,) = open_subjects(directory / "cut", [], "transformers")
    for subject in (ours, theirs):  # warm
        evaluated(subject, options, directory / subject.backend)
    rates, differing = [], 0
    for _ in range(options.rounds):
        mine, said = evaluated(ours, options, directory / "nestling")
        other, heard = evaluated(theirs, options, directory / "transformers")
        rates.append((mine, other))
        differing = sum(a != b for a, b in zip(said, heard, strict=True))
    ratios = [mine / other for mine, other in rates]
    shown = [f"{statistics.median(column):,.0f}" for column in zip(*rates, strict=True)]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
    print(f"| {size} | {shown[0]} | {shown[1]} | {spread} | {differing} of {options.problems} |", flush=True)


if __name__ == "__main__":
    main()
