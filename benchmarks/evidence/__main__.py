"""`python -m benchmarks.evidence`: train every student that is missing, then print the tables."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from ..journal import Journal, commit
from . import pages, tables, worker
from .methods import METHODS, NONE, SETTINGS
from .protocol import Run, carry_out, read
from .students import Result

KINDS = list(dict.fromkeys(kind for kinds in SETTINGS.values() for kind in kinds))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--data", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--objectives", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument(
        "--methods", nargs="+", choices=[m.title for m in (NONE, *METHODS)], default=[], help="default: all"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="that are counted")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each; no result depends on it")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"), help="folder for images and results")
    parser.add_argument(
        "--docs",
        action="store_true",
        help="only write the tables of benchmarks/results/evidence.csv into the documents",
    )
    options = parser.parse_args()
    if options.docs:
        for document, text in pages.written(read(pages.RESULTS)).items():
            document.write_text(text, encoding="utf-8")
        return
    torch.set_num_threads(1)
    for name in options.data:
        print(
            f"{name}: teacher {100 * float(worker.load(name, options.output).teacher_accuracy):.1f} %", file=sys.stderr
        )
    path = options.output / "evidence.csv"
    with ProcessPoolExecutor(
        options.jobs, mp_context=get_context("spawn"), initializer=worker.start, initargs=(options.output,)
    ) as executor:
        journal = Journal(path, Run, Result, executor, worker.carry_out, commit())
        for name in options.data:
            carry_out(name, options.objectives, options.seeds, journal, options.methods)
            print(name, "done", file=sys.stderr, flush=True)
    print(tables.markdown(read(path)))


if __name__ == "__main__":
    main()
