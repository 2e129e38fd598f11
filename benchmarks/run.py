"""Times the balanced step against its competitors, on one and more threads.

Everything is checked against float64 first; red means no numbers. Writes step.csv and step.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from . import gate, memory, report
from .cases import COMPETITORS, KINDS, MODELS, SLOW, Case, Competitor, Kind, Shapes, shapes_of
from .record import Measurement, Row, write
from .timing import Quiet, read_bandwidth, time_rounds


def measure_bandwidth(threads: int, quiet_limit: float | None = None) -> list[Measurement]:
    """What the machine's memory gives, to put beside the steps."""
    return [
        Measurement("probe", name, "", "bandwidth", "GB/s", "", speeds, threads)
        for name, speeds in read_bandwidth(threads, Quiet(quiet_limit)).items()
    ]


def measure_step(
    model: str,
    shapes: Shapes,
    kind: Kind,
    threads: int,
    *,
    rounds: int,
    slow_rounds: int = 0,
    what: str = "step",
    ways: Mapping[str, Callable[[Case], Competitor]] = COMPETITORS,
    quiet_limit: float | None = None,
) -> list[Measurement]:
    """Times, ratios to the unit and bandwidths of all competitors, and the bytes they move by count."""
    torch.set_num_threads(threads)
    case = Case.build(shapes, kind)
    competitors = {name: make(case) for name, make in ways.items()}
    quiet = Quiet(quiet_limit)
    samples = time_rounds(competitors, rounds, slow_rounds, quiet)
    results = [Measurement(what, "other processes", kind, "load", "cores", model, [quiet.load], threads)]
    for name, taken in samples.items():
        config = f"K=2 float32 AdamW with clipping; {case.parameters} parameters; {len(taken)} rounds"
        entry = partial(Measurement, what, name, kind, model=model, threads=threads, config=config)
        results.append(entry("time", "ms", values=[1e3 * s.seconds for s in taken]))
        results.append(entry("ratio", "1", values=[s.seconds / s.unit for s in taken]))
        traffic = competitors[name].traffic
        if traffic is not None:
            moved = traffic.total * case.parameters
            results.append(entry("bandwidth", "GB/s", values=[moved / 1e9 / s.seconds for s in taken]))
            results.append(entry("reads", "B/parameter", values=[traffic.reads], evidence="counted"))
            results.append(entry("writes", "B/parameter", values=[traffic.writes], evidence="counted"))
    return results


def measure_memory(model: str, shapes: Shapes) -> list[Measurement]:
    """Extra memory at the peak of a step, in a fresh process."""
    return [
        Measurement("step", name, "interior", "memory", "MB", model, [extra / 1e6], torch.get_num_threads())
        for name, extra in memory.peak_extra_bytes(shapes).items()
    ]


def run(
    models: Mapping[str, Shapes],
    output: Path,
    *,
    threads: Sequence[int],
    rounds: int,
    slow_rounds: int,
    kinds: Sequence[Kind] = KINDS,
    quiet_limit: float | None = None,
    with_memory: bool = True,
) -> list[Row]:
    """Check all competitors, measure them, and write the results to `output`.

    Raises:
        AssertionError: a competitor's result is wrong; nothing was measured then.
    """
    gate.check()
    results: list[Measurement] = []
    for t in threads:
        results += measure_bandwidth(t, quiet_limit)
        for model, shapes in models.items():
            for kind in kinds:
                results += measure_step(
                    model, shapes, kind, t, rounds=rounds, slow_rounds=slow_rounds, quiet_limit=quiet_limit
                )
                write(output / "step.csv", results)  # a long run that is cut off leaves what it has
                print(f"measured {model}, {kind} case, threads: {t}", file=sys.stderr)
    if with_memory:
        for model, shapes in models.items():
            results += measure_memory(model, shapes)
    rows = write(output / "step.csv", results)
    report.plot_ratios(rows, output / "step.png")
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f"{', '.join(MODELS)}, or timm's names")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--slow-rounds", type=int, default=5, help=f"rounds of {', '.join(SLOW)}")
    parser.add_argument(
        "--quiet",
        type=float,
        metavar="CORES",
        help="wait until other processes use less than this, and repeat rounds in which they used more",
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure the peak memory")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the results")
    options = parser.parse_args()
    rows = run(
        {model: shapes_of(model) for model in options.models},
        options.output,
        threads=options.threads,
        rounds=options.rounds,
        slow_rounds=options.slow_rounds,
        kinds=options.kinds,
        quiet_limit=options.quiet,
        with_memory=not options.no_memory,
    )
    print(report.step_tables(rows))


if __name__ == "__main__":
    main()
