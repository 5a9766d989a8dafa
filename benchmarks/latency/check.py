"""How far a latency table is from fresh medians of random sub-models that it has not seen.

    OMP_NUM_THREADS=1 python benchmarks/latency/check.py runs/demo.toml
    OMP_NUM_THREADS=2 python benchmarks/latency/check.py benchmarks/latency/hybrid-512.json --table latency.json

Makes the table as `nestling bench --latency` does (or reads one), then times other sub-models, drawn with another seed,
in the same way, and prints the table's error for each. All take turns, so that load hits the sizes of one pass alike;
load that differs between the two passes is an error of both.
"""

import argparse
import statistics
from pathlib import Path

from nestling.cli.checkpoints import _architecture_and_space
from nestling.infer.timing import Timing, candidates, time_submodels
from nestling.units import parse_context
from nestling.weights.elastic import read_latencies


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("target")
    options.add_argument("--table", type=Path)
    options.add_argument("--sizes", type=int, default=48)
    options.add_argument("--fresh", type=int, default=24)
    options.add_argument("--context", default="512")
    options.add_argument("--rounds", type=int, default=15)
    given = options.parse_args()
    architecture, space = _architecture_and_space(given.target)
    how = Timing(context=parse_context(given.context), rounds=given.rounds)
    if given.table is None:
        table = time_submodels(architecture, candidates(architecture, space, given.sizes, 0), how, lambda done: None)
    else:
        table = read_latencies(given.table)
    typical, worst = table.held_out()
    print(dict(table.how))
    print(f"held out while fitting: {typical:.1%} median, {worst:.1%} worst")
    fresh = candidates(architecture, space, given.fresh + 1, 1)[1:]
    timed = time_submodels(architecture, fresh, how, lambda done: None)
    errors = []
    for submodel, milliseconds in timed.rows:
        errors.append(table.measure(submodel) / milliseconds - 1)
        print(f"{milliseconds:9.3f} ms measured, {table.measure(submodel):9.3f} ms in the table, {errors[-1]:+6.1%}")
    size = sorted(map(abs, errors))
    within = sum(error <= 0.15 for error in size)
    print(f"median {statistics.median(size):.1%}, worst {size[-1]:.1%}, within 15 %: {within} of {len(size)}")
    print(f"in one direction (a change of load between the passes): {statistics.median(errors):+.1%}")


if __name__ == "__main__":
    main()
