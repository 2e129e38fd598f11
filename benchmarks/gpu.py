"""Measures on a GPU: the balanced step and whole iterations against their competitors, each row written as it comes.

    python -m benchmarks.gpu facts gate steps kernels iterations --models deit_tiny vit_base

Steps are timed by device events, eager and replayed from a CUDA graph, beside the host's time of an eager step. What is
not installed (TorchJD, Triton, the CUDA extension), does not fit, gives wrong results (every competitor is checked
against float64) or raises an error is left out, and `left_out.txt` says why. Needs no network. `benchmarks.lease` runs
this in stages.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from dtokd_kernels import backends, implementations

from . import gate, iterations, report
from .cases import (
    COMPETITORS,
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
from .record import Measurement, read, write

#: "12e6" still takes one launch, though an H100 would keep less than half of its gradients; "deit_small" takes two.
MODELS = ("deit_tiny", "12e6", "deit_small", "vit_base", "1e9")
PARTS = ("facts", "gate", "steps", "kernels", "iterations")
COPY_BYTES = 2**30
#: What a kernel reads and writes per parameter, of two float32 gradients, by a part of its name: as docs/gpu.md counts.
KERNEL_BYTES = {"gram_update_kernel": 32, "gram_kernel": 8, "update_kernel": 32, "FusedAdam": 28, "fused_adam": 28}
#: Ways to an updated student that are timed on a GPU.
WAYS = (
    iterations.SUM,
    "exact",
    "lag",
    "every n, between measurements",
    "feature, last block's output",
    iterations.FROZEN,
)


class Results:
    """The rows of one run, in a file that is whole after each of them.

    Args:
        folder: where gpu.csv and left_out.txt go.
        device: that is measured.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.evidence = "measured-gpu" if device == "cuda" else "measured-cpu"
        self._kept: list[Measurement] = []
        self.left_out: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, *measurements: Measurement) -> None:
        """Write more rows."""
        self._kept += measurements
        self.show()

    def show(self, going_on: Sequence[Measurement] = ()) -> None:
        """Write the file, with rows that more rounds will replace."""
        if rows := [*self._kept, *going_on]:
            write(self.folder / "gpu.csv", rows)

    @contextlib.contextmanager
    def or_left_out(self, what: str) -> Iterator[None]:
        """Go on after an error inside, and write down what it was."""
        try:
            yield
        except Exception as error:  # whatever a competitor does, the others are measured
            lines = str(error).strip().splitlines() or [""]
            self.leave_out(what, f"{type(error).__name__}: {lines[0]}")

    def leave_out(self, what: str, reason: str) -> None:
        """Write down that something was not measured, and why."""
        self.left_out[what] = reason
        print(f"left out: {what}: {reason}", file=sys.stderr, flush=True)
        lines = [f"{name}: {why}" for name, why in self.left_out.items()]
        (self.folder / "left_out.txt").write_text("\n".join(lines) + "\n")


def shapes(model: str) -> Shapes:
    """Parameter shapes; "1e9" is one tensor of so many."""
    return [(int(float(model)),)] if model[0].isdigit() else shapes_of(model)


def competitors(
    device: str, parameters: int = 0, only: Sequence[str] = (), results: Results | None = None
) -> dict[str, Callable[[Case], Competitor]]:
    """Those that can run here, and are not one and the same for so many parameters; the unit first.

    Args:
        device: their tensors' type.
        parameters: how many numbers they update.
        only: backends of this project; none: all. With some, the competitors of others are left out too.
        results: where it is written down what is not there.
    """
    found: dict[str, Callable[[Case], Competitor]] = {"fused": fused}
    for name, backend in backends._BACKENDS.items():
        if name == "reference" or backend.device != device or (only and name not in only):
            continue
        if (reason := backend.missing()) is None:
            found[f"dtokd {name}"] = partial(dtokd, backend=name)
            if name == "cuda" and parameters <= implementations.RESIDENT_PARAMETERS:
                found["dtokd cuda two launches"] = partial(dtokd, backend=name, gram=TwoLaunches())
            found[f"dtokd {name} lag"] = partial(lag_step, backend=name)
            found[f"dtokd {name} overlap"] = partial(iterations.overlap_step, backend=name)
            found[f"dtokd {name} lag with check"] = partial(lag_step, backend=name, check=True)
        elif results is not None:
            results.leave_out(f"dtokd {name}", reason)
    if only and "cuda" not in only:
        return found
    found |= {"clip_fused": clip_fused, "foreach_fused": foreach_fused, "foreach": foreach}
    if find_spec("torchjd"):
        found |= {name: COMPETITORS[name] for name in ("mgda", "mgda_gramian")}
    elif results is not None:
        results.leave_out("TorchJD", "not installed")
    return found


#: Those whose step has no host sync, so that a graph can hold it.
CAPTURABLE = (
    "fused",
    *(
        f"dtokd {backend}{way}"
        for backend in ("cuda", "triton")
        for way in ("", " two launches", " lag", " overlap", " lag with check")
        if (backend, way) != ("triton", " two launches")
    ),
)


class Clock:
    """Milliseconds of calls on a device: by events on a GPU, by the wall clock on a CPU (to test this file)."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def measure(self, step: Callable[[], object], prepare: Callable[[], object], calls: int) -> float:
        """Mean time of a step; what `prepare` takes is left out."""
        if not self.on_gpu:
            return self.host(step, prepare, calls)
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        torch.cuda.synchronize()
        for before, after in events:
            prepare()
            before.record()
            step()
            after.record()
        torch.cuda.synchronize()
        return sum(before.elapsed_time(after) for before, after in events) / calls

    def host(self, step: Callable[[], object], prepare: Callable[[], object], calls: int) -> float:
        """Mean time until a step returns, which the device may still work on."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds = 0.0
        for _ in range(calls):
            prepare()
            start = time.perf_counter()
            step()
            seconds += time.perf_counter() - start
        return 1e3 * seconds / calls


def facts(results: Results) -> None:
    """What the device is, and how fast its memory is copied."""
    entry = partial(Measurement, "probe", model="", threads=1, evidence=results.evidence)
    if results.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        known = {
            "multiprocessors": properties.multi_processor_count,
            "L2 cache, MB": properties.L2_cache_size / 1e6,
            "memory, GB": properties.total_memory / 1e9,
            "compute capability": properties.major + properties.minor / 10,
            "driver's CUDA version": backends.driver_version() // 1000 + backends.driver_version() % 1000 / 1000,
        }
        results.add(*(entry(name, "", "fact", "", values=[value]) for name, value in known.items()))
    results.add(entry("copy", "", "bandwidth", "GB/s", values=copy_bandwidth(results.device)))


def copy_bandwidth(device: str, samples: int = 9) -> list[float]:
    """GB/s of a copy from and to the device's memory, reads and writes counted."""
    source = torch.empty(COPY_BYTES if device == "cuda" else COPY_BYTES // 64, dtype=torch.uint8, device=device)
    target, clock = torch.empty_like(source), Clock(device)
    moved = 2 * source.numel() / 1e6
    return [moved / clock.measure(lambda: target.copy_(source), lambda: None, 4) for _ in range(samples)]


def check(results: Results, only: Sequence[str] = ()) -> set[str]:
    """The competitors whose steps are right, of small tensors, against float64: a first test of every launch."""
    right = set()
    for name, make in competitors(results.device, only=only, results=results).items():
        with results.or_left_out(name):
            gate.check({name: make}, results.device)
            right.add(name)
            entry = partial(Measurement, "gate", name, "", "right", "", "", threads=1)
            results.add(entry(values=[1.0], evidence=results.evidence))
    return right


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


def steps(
    results: Results, model: str, kind: Kind, rounds: int, calls: int, right: set[str], only: Sequence[str] = ()
) -> None:
    """Times, ratios to the unit of the same round, bandwidths and the host's times; written after each round."""
    case = Case.build(shapes(model), kind, device=results.device)
    clock = Clock(results.device)
    made: dict[str, Competitor] = {}
    ways: dict[tuple[str, str], tuple[Callable[[], object], Callable[[], object]]] = {}
    for name, make in competitors(results.device, case.parameters, only).items():
        if name not in right:
            continue
        with results.or_left_out(f"{name}, {model}"):
            competitor = make(case)
            clock.measure(competitor.step, competitor.prepare, 2)
            made[name], ways["eager", name] = competitor, (competitor.step, competitor.prepare)
        if results.device == "cuda" and name in CAPTURABLE and name in made:
            with results.or_left_out(f"{name} in a graph, {model}"):
                ways["graph", name] = captured(made[name]), made[name].prepare
    taken: list[dict[tuple[str, str], float]] = []
    host: dict[str, list[float]] = {}
    shuffle = random.Random(0)
    entry = partial(Measurement, "step", model=model, threads=1, evidence=results.evidence)

    def rows(finished: int) -> list[Measurement]:
        config = f"K=2 float32 AdamW with clipping, {kind}; {case.parameters} parameters; {finished} rounds of {calls}"
        made_of = partial(entry, config=config)
        found = []
        for mode, name in ways:
            times = [of_round[mode, name] for of_round in taken]
            found.append(made_of(name, mode, "time", "ms", values=times))
            if (mode, UNIT) in ways:
                ratios = [of_round[mode, name] / of_round[mode, UNIT] for of_round in taken]
                found.append(made_of(name, mode, "ratio", "1", values=ratios))
            if (traffic := made[name].traffic) is not None:
                moved = traffic.total * case.parameters / 1e6
                found.append(made_of(name, mode, "bandwidth", "GB/s", values=[moved / t for t in times]))
                counted = partial(made_of, name, mode, unit="B/parameter", evidence="counted")
                found.append(counted("reads", values=[traffic.reads]))
                found.append(counted("writes", values=[traffic.writes]))
            if mode == "eager":
                found.append(made_of(name, mode, "host", "ms", values=host[name]))
        return found

    for number in range(rounds):
        of_round: dict[tuple[str, str], float] = {}
        for key in shuffle.sample(list(ways), len(ways)):
            mode, name = key
            try:
                with results.or_left_out(f"{name}, {mode}, {model}"):
                    clock.measure(*ways[key], 2)  # caches hold what its own last step left there
                    of_round[key] = clock.measure(*ways[key], calls)
                    if mode == "eager":
                        host.setdefault(name, []).append(clock.host(*ways[key], calls))
            finally:
                if key not in of_round:
                    del ways[key]
        taken.append(of_round)
        results.show(rows(number + 1))
    results.add(*rows(rounds))


def kernels(results: Results, model: str, right: set[str], only: Sequence[str] = ()) -> None:
    """Microseconds of each kernel of a step by torch's profiler, beside what a copy of its bytes would take."""
    if results.device != "cuda":
        results.leave_out(f"kernels, {model}", "there is no device to profile")
        return
    case = Case.build(shapes(model), "interior", device=results.device)
    speed = next(
        (float(r["y_value_50"]) for r in read_if_there(results.folder) if r["kernel_provider"] == "copy"), 0.0
    ) or max(copy_bandwidth(results.device, 3))
    for name, make in competitors(results.device, case.parameters, only).items():
        if name not in right or name not in CAPTURABLE:
            continue
        with results.or_left_out(f"kernels of {name}, {model}"):
            competitor = make(case)
            for _ in range(3):
                competitor.prepare()
                competitor.step()
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(10):
                    competitor.prepare()
                    competitor.step()
                torch.cuda.synchronize()
            for event in profile.key_averages():
                micro = event.device_time_total / 10
                entry = partial(Measurement, "kernel", event.key[:90], name, model=model, threads=1)
                results.add(entry("time", "us", values=[micro], evidence=results.evidence))
                if count := next((b for part, b in KERNEL_BYTES.items() if part in event.key), 0):
                    moved = count * case.parameters
                    results.add(
                        entry("bytes", "B/parameter", values=[count], evidence="counted"),
                        entry("model", "us", values=[moved / speed / 1e3], evidence="model"),
                    )


def read_if_there(folder: Path) -> list[dict[str, str]]:
    """The rows of a run so far."""
    path = folder / "gpu.csv"
    return read(path) if path.exists() else []


def whole_iterations(results: Results, student: str, teacher: str, batch: int, size: int, rounds: int) -> None:
    """Milliseconds of training iterations: eager, compiled and in bfloat16, with the teacher and with cached logits."""
    for mode in ("eager", "bf16", "compiled"):
        config = f"student {student}, teacher {teacher}, batch {batch}, {size} px"
        with results.or_left_out(f"iterations, {mode}"):
            pair = iterations.Pair(student, teacher, batch, size, device=results.device, mode=mode)
            iteration = iterations.Iteration(pair)
            names = {(name, cached) for name in WAYS for cached in ((False, True) if name == "exact" else (False,))}
            taken: dict[tuple[str, bool], list[float]] = {}
            for number in range(rounds + 1):
                for way in sorted(names):
                    name, cached = way
                    title = f"{name}, cached teacher" if cached else name
                    seconds = None
                    with results.or_left_out(f"iterations, {mode}: {title}"):
                        seconds = iteration.seconds(name, cached)
                    if seconds is None:
                        names.discard(way)
                        taken.pop(way, None)
                    elif number:  # the first warms up, and makes the one measurement of `Every`
                        taken.setdefault(way, []).append(1e3 * seconds)
                entry = partial(Measurement, "iteration", model="", threads=1, evidence=results.evidence, config=config)
                found = []
                for (name, cached), times in taken.items():
                    title = f"{name}, cached teacher" if cached else name
                    found.append(entry(title, mode, "time", "ms", values=times))
                    if (unit := taken.get((iterations.SUM, False))) is not None:
                        ratios = [t / u for t, u in zip(times, unit, strict=True)]
                        found.append(entry(title, mode, "ratio", "1", values=ratios))
                results.show(found)
            results.add(*found)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of cases.MODELS, or a number")
    parser.add_argument("--only", nargs="+", default=[], help="backends of this project; default: all that are there")
    parser.add_argument("--kind", choices=("interior", "vertex"), default="interior")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=5, help="steps of each competitor in a round")
    parser.add_argument("--student", default="deit_tiny")
    parser.add_argument("--teacher", default="deit_small")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu/by_hand"), help="folder for the results")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {unknown.pop()!r}; choose of {', '.join(PARTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    results = Results(options.output, options.device)
    right = set(competitors(options.device, only=options.only))
    if "facts" in options.parts:
        with results.or_left_out("facts"):
            facts(results)
    if "gate" in options.parts:
        right = check(results, options.only)
    for model in options.models:
        if "steps" in options.parts:
            with results.or_left_out(f"steps, {model}"):
                steps(results, model, options.kind, options.rounds, options.calls, right, options.only)
        if "kernels" in options.parts:
            with results.or_left_out(f"kernels, {model}"):
                kernels(results, model, right, options.only)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if "iterations" in options.parts:
        whole_iterations(
            results, options.student, options.teacher, options.batch, options.size, max(1, options.rounds // 3)
        )
    print(report.gpu_tables(read_if_there(options.output)))


if __name__ == "__main__":
    main()
