"""`python -m benchmarks.datafree`: train every student without data that is missing, then print the tables."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from ..journal import Journal, commit
from . import sets, students
from .protocol import ITERATIONS, SEEDS, carry_out, outcomes, sources_of, table
from .students import Result, Run


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.datafree", description=__doc__)
    parser.add_argument("--data", nargs="+", choices=list(sets.MAKERS), default=list(sets.MAKERS))
    parser.add_argument("--sources", nargs="+", metavar="SOURCE", help="of images; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="that are counted")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of each student")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each; no result depends on it")
    parser.add_argument("--output", type=Path, default=Path("runs/datafree"), help="folder for teachers and results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    teachers = {name: sets.load(name, options.output).teacher_accuracy for name in options.data}
    with ProcessPoolExecutor(
        options.jobs, mp_context=get_context("spawn"), initializer=students.start, initargs=(options.output,)
    ) as executor:
        journal = Journal(options.output / "datafree.csv", Run, Result, executor, students.train, commit())
        for name in options.data:
            sources = [s for s in sources_of(name) if not options.sources or s in options.sources]
            carry_out(name, sources, options.seeds, options.iterations, journal)
            found = outcomes(name, options.seeds, options.iterations, journal.done)
            print(f"### {name}\n\nTeacher: {teachers[name]:.1f} %.\n\n{table(found)}\n", flush=True)
    print(f"{len(journal.done)} students on file", file=sys.stderr)


if __name__ == "__main__":
    main()
