"""What each source of the Gram matrix costs, how close its weights come, and where training with it ends.

Writes sources.csv. See `benchmarks/iterations.py` for the times and `benchmarks/closeness.py` for the rest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import closeness, iterations, report, run
from .cases import shapes_of
from .record import Measurement, Row, read, write

#: Ways that take one full backward pass, compared at a larger batch too.
ONE_PASS = ("probe, last block", "feature, last block's output", "every n, between measurements", "amortized, famo")
#: The parts by the name of what they measure.
NAMED = {"step left": "steps", "iteration": "iterations", "closeness": "closeness"}
PARTS = tuple(NAMED.values())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sources", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="of the students")
    parser.add_argument("--objectives", nargs="+", choices=["feature", "logit"], default=["feature", "logit"])
    parser.add_argument("--iterations", type=int, default=400, help="of each student")
    parser.add_argument("--teacher-iterations", type=int, default=500)
    parser.add_argument("--models", nargs="+", default=["deit_tiny", "deit_small", "vit_base"], help="shapes of steps")
    parser.add_argument("--student", default="deit_tiny")
    parser.add_argument("--teacher", default="deit_small")
    parser.add_argument("--batches", nargs=2, type=int, default=[8, 16], help="of all ways; of those with one pass")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--rounds", type=int, default=7, help="of iterations; steps take ten times as many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quiet", type=float, metavar="CORES", help="as in benchmarks.run")
    parser.add_argument("--keep", type=Path, metavar="CSV", help="take the other parts from an earlier sources.csv")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: list[Measurement] = []
    rows: list[Row] = []
    if options.keep is not None:
        rows = [row for row in read(options.keep) if NAMED[row["kernel_name"]] not in options.parts]
    if "steps" in options.parts:
        for model in options.models:
            results += run.measure_step(
                model,
                shapes_of(model),
                "interior",
                options.threads,
                rounds=10 * options.rounds,
                what="step left",
                ways=iterations.STEPS,
                quiet_limit=options.quiet,
            )
    if "iterations" in options.parts:
        for batch, names in zip(options.batches, (None, ONE_PASS), strict=True):
            results += iterations.measure_iterations(
                options.student,
                options.teacher,
                batch=batch,
                size=options.size,
                rounds=options.rounds,
                names=names,
                quiet_limit=options.quiet,
            )
    if "closeness" in options.parts:
        results += closeness.measure(
            options.objectives, options.seeds, options.iterations, options.teacher_iterations, _tell
        )
    print(report.sources_tables(write(options.output / "sources.csv", results, rows)))


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
