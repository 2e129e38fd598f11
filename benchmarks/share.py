"""Where the time of a distillation iteration goes: the models, the backward passes, the balanced step.

A timm deit_tiny learns from a deit_small, both untrained: their speed does not depend on it. Writes share.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import dtokd_kernels as dk

from . import report
from .cases import LR, MAX_NORM, fill
from .pair import Pair
from .record import Measurement, write
from .timing import Quiet, seconds_of

STATIC_BACKWARD = "static distillation: backward of the sum"
STATIC_STEP = "static distillation: torch's fused AdamW"
REFERENCE_STEP = "balanced step, backend reference"
#: What is timed beside a balanced iteration.
COMPARED = (STATIC_BACKWARD, REFERENCE_STEP, STATIC_STEP)
BALANCED, STATIC = "balanced iteration", "static iteration"


class Iteration:
    """One training iteration in parts that can be timed apart.

    Args:
        student, teacher: models of timm.
        batch: images per iteration.
        size: their height and width in pixels.
    """

    def __init__(self, student: str, teacher: str, batch: int, size: int) -> None:
        self._pair = Pair(student, teacher, batch, size)
        self._params = list(self._pair.student.parameters())
        native, reference = (
            dk.DTOAdamW(self._params, lr=LR, max_norm=MAX_NORM, backend=name) for name in ("cpu", "reference")
        )
        #: The parts of an iteration in their order, those in COMPARED among them.
        self.parts: dict[str, Callable[[], object]] = {
            "teacher forward": self._teacher_forward,
            "student forward": self._student_forward,
            "backward of the distillation loss": lambda: self._backward(self._distill),
            "backward of the task loss": lambda: self._backward(self._task),
            STATIC_BACKWARD: lambda: self._backward(self._task + self._distill),
            "balanced step": lambda: self._balanced_step(native),
            REFERENCE_STEP: lambda: self._balanced_step(reference),
            STATIC_STEP: torch.optim.AdamW(self._params, lr=LR, fused=True).step,
        }

    def _teacher_forward(self) -> None:
        self._target = self._pair.teach()

    def _student_forward(self) -> None:
        losses = self._pair.losses(self._target)
        self._task, self._distill = losses["task"], losses["distill"]
        self._grads: list[list[Tensor]] = []

    def _backward(self, loss: Tensor) -> None:
        for p in self._params:
            p.grad = None
        loss.backward(retain_graph=True)
        self._grads.append([p.grad for p in self._params if p.grad is not None])

    def _balanced_step(self, optimizer: dk.DTOAdamW) -> None:
        fill(optimizer, torch.stack([self._distill, self._task]).detach().double(), self._grads[:2])
        optimizer.step()


def measure(
    student: str,
    teacher: str,
    *,
    batch: int,
    size: int,
    threads: int,
    iterations: int,
    quiet_limit: float | None = None,
) -> list[Measurement]:
    """Time of each part, and its share of the balanced iteration."""
    torch.set_num_threads(threads)
    iteration = Iteration(student, teacher, batch, size)
    quiet = Quiet(quiet_limit)

    def once() -> dict[str, float]:
        seconds = {name: seconds_of(part) for name, part in iteration.parts.items()}
        balanced = sum(t for name, t in seconds.items() if name not in COMPARED)
        static = seconds["teacher forward"] + seconds["student forward"]
        static += seconds[STATIC_BACKWARD] + seconds[STATIC_STEP]
        return {BALANCED: balanced, STATIC: static, **seconds}

    once()
    taken = [quiet.run(once) for _ in range(iterations)]
    config = f"student {student}, teacher {teacher}, batch {batch}, {size} px, {iterations} iterations"
    results = []
    for name in taken[0]:
        times = [seconds[name] for seconds in taken]
        shares = [100 * seconds[name] / seconds[BALANCED] for seconds in taken]
        for metric, unit, values in (("time", "ms", [1e3 * t for t in times]), ("share", "%", shares)):
            results.append(Measurement("iteration", name, "", metric, unit, student, values, threads, config))
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.share", description=__doc__)
    parser.add_argument("--student", default="deit_tiny")
    parser.add_argument("--teacher", default="deit_small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--quiet", type=float, metavar="CORES", help="as in benchmarks.run")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the results")
    options = parser.parse_args()
    results = []
    for threads in options.threads:
        results += measure(
            options.student,
            options.teacher,
            batch=options.batch,
            size=options.size,
            threads=threads,
            iterations=options.iterations,
            quiet_limit=options.quiet,
        )
    print(report.share_table(write(options.output / "share.csv", results)))


if __name__ == "__main__":
    main()
