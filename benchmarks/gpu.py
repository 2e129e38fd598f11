"""Times the balanced step on a GPU against its competitors, by device events, eager and replayed from a CUDA graph.

Everything is checked against float64 first. Writes gpu.csv, gpu.json and gpu.png. Needs no network; what is not
installed (TorchJD, Triton, the CUDA extension) is left out and said so.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from dtokd_kernels import backends, implementations

from . import gate, report
from .cases import (
    UNIT,
    Case,
    Competitor,
    Kind,
    Shapes,
    TwoLaunches,
    clip_fused,
    dtokd,
    foreach,
    foreach_fused,
    fused,
    lag_step,
    shapes_of,
)
from .record import Measurement, Row, write

#: "12e6" still takes one launch, though an H100 would keep less than half of its gradients; "deit_small" takes two.
MODELS = ("deit_tiny", "12e6", "deit_small", "vit_base", "1e9")
COPY_BYTES = 2**30


def shapes(model: str) -> Shapes:
    """Parameter shapes; "1e9" is one tensor of so many."""
    return [(int(float(model)),)] if model[0].isdigit() else shapes_of(model)


def competitors(device: str, parameters: int = 0) -> dict[str, Callable[[Case], Competitor]]:
    """Those that can run here, and are not one and the same for so many parameters; the unit first."""
    found: dict[str, Callable[[Case], Competitor]] = {"fused": fused, "clip_fused": clip_fused}
    for name, backend in backends._BACKENDS.items():
        if name == "reference" or backend.device != device:
            continue
        if (reason := backend.missing()) is None:
            found[f"dtokd {name}"] = partial(dtokd, backend=name)
            if name == "cuda" and parameters <= implementations.RESIDENT_PARAMETERS:
                found["dtokd cuda two launches"] = partial(dtokd, backend=name, gram=TwoLaunches())
            found[f"dtokd {name} lag"] = partial(lag_step, backend=name)
            found[f"dtokd {name} lag with check"] = partial(lag_step, backend=name, check=True)
        else:
            print(f"left out: dtokd {name}: {reason}", file=sys.stderr)
    found |= {"foreach_fused": foreach_fused, "foreach": foreach}
    if find_spec("torchjd"):
        from .cases import COMPETITORS

        found |= {name: COMPETITORS[name] for name in ("mgda", "mgda_gramian")}
    else:
        print("left out: TorchJD: not installed", file=sys.stderr)
    return found


#: Those whose step has no host sync, so that a graph can hold it.
CAPTURABLE = (
    "fused",
    "dtokd cuda",
    "dtokd cuda two launches",
    "dtokd cuda lag",
    "dtokd cuda lag with check",
    "dtokd triton",
    "dtokd triton lag",
    "dtokd triton lag with check",
)


class Clock:
    """Milliseconds of calls on a device: by events on a GPU, by the wall clock on a CPU (to test this file)."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def measure(self, step: Callable[[], object], prepare: Callable[[], object], calls: int) -> float:
        """Mean time of a step; what `prepare` takes is left out."""
        if not self.on_gpu:
            seconds = 0.0
            for _ in range(calls):
                prepare()
                start = time.perf_counter()
                step()
                seconds += time.perf_counter() - start
            return 1e3 * seconds / calls
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        torch.cuda.synchronize()
        for before, after in events:
            prepare()
            before.record()
            step()
            after.record()
        torch.cuda.synchronize()
        return sum(before.elapsed_time(after) for before, after in events) / calls


def copy_bandwidth(device: str, clock: Clock, samples: int = 9) -> list[float]:
    """GB/s of a copy from and to the device's memory, reads and writes counted."""
    source = torch.empty(COPY_BYTES if device == "cuda" else COPY_BYTES // 64, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() / 1e6
    return [moved / clock.measure(lambda: target.copy_(source), lambda: None, 4) for _ in range(samples)]


def captured(competitor: Competitor) -> Callable[[], object]:
    """The competitor's step as a graph's replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            competitor.prepare()
            competitor.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    competitor.prepare()
    with torch.cuda.graph(graph):
        competitor.step()
    return graph.replay


def measure(model: str, kind: Kind, device: str, rounds: int, calls: int) -> list[Measurement]:
    """Times, ratios to the unit of the same round, and bandwidths of all competitors."""
    case = Case.build(shapes(model), kind, device=device)
    clock = Clock(device)
    made = {name: make(case) for name, make in competitors(device, case.parameters).items()}
    steps = {("eager", name): (c.step, c.prepare) for name, c in made.items()}
    if device == "cuda":
        steps |= {("graph", n): (captured(made[n]), made[n].prepare) for n in CAPTURABLE if n in made}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    shuffle = random.Random(0)
    for _ in range(rounds):
        for key in shuffle.sample(list(steps), len(steps)):
            clock.measure(*steps[key], 2)  # caches hold what its own last step left there
            times[key].append(clock.measure(*steps[key], calls))
    results = []
    evidence = "measured-gpu" if device == "cuda" else "measured-cpu"
    for (mode, name), taken in times.items():
        config = f"K=2 float32 AdamW with clipping, {kind}; {case.parameters} parameters; {rounds} rounds of {calls}"
        entry = partial(Measurement, "step", name, mode, model=model, threads=1, config=config)
        results.append(entry("time", "ms", values=taken, evidence=evidence))
        ratios = [t / unit for t, unit in zip(taken, times[mode, UNIT], strict=True)]
        results.append(entry("ratio", "1", values=ratios, evidence=evidence))
        traffic = made[name].traffic
        if traffic is not None:
            moved = traffic.total * case.parameters / 1e6
            results.append(entry("bandwidth", "GB/s", values=[moved / t for t in taken], evidence=evidence))
            results.append(entry("reads", "B/parameter", values=[traffic.reads], evidence="counted"))
            results.append(entry("writes", "B/parameter", values=[traffic.writes], evidence="counted"))
    return results


def run(models: Sequence[str], kind: Kind, device: str, output: Path, rounds: int, calls: int) -> list[Row]:
    """Check the competitors, measure, and write the results.

    Raises:
        AssertionError: a competitor's result is wrong; nothing was measured then.
    """
    gate.check(competitors(device), device)
    clock = Clock(device)
    results = [
        Measurement("probe", "copy", "", "bandwidth", "GB/s", "", copy_bandwidth(device, clock), 1, evidence="measured")
    ]
    for model in models:
        try:
            results += measure(model, kind, device, rounds, calls)
        except torch.OutOfMemoryError:
            print(f"left out: {model}: not enough memory on this GPU", file=sys.stderr)
        if device == "cuda":
            torch.cuda.empty_cache()
        rows = write(output / "gpu.csv", results)  # a run that is cut off leaves what it has
        (output / "gpu.json").write_text(json.dumps(rows, indent=1) + "\n")
    report.plot_ratios(rows, output / "gpu.png")
    return rows


def main(defaults: Mapping[str, object] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of cases.MODELS, or a number")
    parser.add_argument("--kind", choices=("interior", "vertex"), default="interior")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=5, help="steps of each competitor in a round")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder for the results")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    rows = run(options.models, options.kind, options.device, options.output, options.rounds, options.calls)
    print(report.step_tables(rows))


if __name__ == "__main__":
    main()
