"""What each source costs: whole training iterations, and what is left between backward and the end of step.

A timm deit_tiny learns from a deit_small, both untrained: their speed does not depend on it. All ways share student,
batch and parameters, and each round runs them once in random order; ratios are taken within a round.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

import dtokd_kernels as dk
from dtokd_kernels.sources import Every, Feature, Probe
from dtokd_kernels.weighting import Amortized, Fixed

from .cases import LR, MODELS, Case, Competitor, dtokd, fused, lag_step, nothing, optimizer_of
from .record import Measurement
from .timing import Quiet, seconds_of

SUM = "weighted sum, torch's fused AdamW"
#: As `weighting.Auto` goes on after its choice.
FROZEN = "frozen weights"
TEMPERATURE = 4.0


@dataclass(frozen=True)
class Way:
    """One way to get from two losses to updated parameters.

    Attributes:
        backward: takes the losses; leaves gradients.
        step: updates.
        before: before the forward pass.
    """

    backward: Callable[[dict[str, Tensor]], object]
    step: Callable[[], object]
    before: Callable[[], object] = nothing


class Pair:
    """A student that learns logits from its teacher, and one batch of random images. Both are untrained models of timm.

    Args:
        student, teacher: models of timm, or their short names.
        batch: images per iteration.
        size: their height and width in pixels.
        device: where they are.
        mode: "eager"; "compiled": the student by torch.compile; "bf16": forward passes in bfloat16, by autocast.
    """

    def __init__(
        self, student: str, teacher: str, batch: int, size: int, device: str = "cpu", mode: str = "eager"
    ) -> None:
        torch.manual_seed(0)
        self.device = device
        self.student = timm.create_model(MODELS.get(student, student)).to(device)
        self._teacher = timm.create_model(MODELS.get(teacher, teacher)).eval().to(device)
        self._images = torch.rand(batch, 3, size, size).to(device)
        self._labels = torch.arange(batch, device=device)
        self._cast = partial(torch.autocast, device, torch.bfloat16, enabled=mode == "bf16")
        self._forward = self.student
        if mode == "compiled":
            torch._functorch.config.donated_buffer = False  # several passes read what one leaves
            self._forward = torch.compile(self.student)

    @torch.no_grad()
    def teach(self) -> Tensor:
        """The teacher's forward pass: softened predictions [batch, classes]."""
        with self._cast():
            return F.softmax(self._teacher(self._images).float() / TEMPERATURE, 1)

    def losses(self, target: Tensor) -> dict[str, Tensor]:
        """The student's forward pass: "task" and "distill"."""
        with self._cast():
            logits = self._forward(self._images).float()
        distill = F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), target, reduction="batchmean")
        return {"task": F.cross_entropy(logits, self._labels), "distill": distill}


class Iteration:
    """A training iteration, the same but for the way from losses to parameters.

    Args:
        pair: student and teacher.
    """

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._target: Tensor | None = None  # the teacher's cached predictions
        self._params = list(pair.student.parameters())
        *_, last = pair.student.get_submodule("blocks").children()
        self.ways: dict[str, Way] = {
            SUM: self._sum(),
            "exact": self._balanced(gram="exact"),
            "overlap": self._balanced(gram="overlap"),
            "lag": self._balanced(gram="lag"),
            "probe, last block": self._balanced(gram=Probe(last)),
            "feature, last block's output": self._balanced(gram=Feature(last)),
            "every n, between measurements": self._balanced(gram=Every(1 << 30)),
            "amortized, famo": self._balanced(weighting=Amortized()),
            FROZEN: self._balanced(weighting=Fixed([1.0, 1.0])),
            "TorchJD MGDA": self._torchjd("MGDA"),
            "TorchJD UPGrad": self._torchjd("UPGrad"),
        }

    def _sum(self) -> Way:
        optimizer = torch.optim.AdamW(self._params, lr=LR, fused=True)
        return Way(lambda losses: sum(losses.values()).backward(), optimizer.step, optimizer.zero_grad)  # type: ignore[union-attr]

    def _balanced(self, **options: Any) -> Way:
        optimizer = dk.DTOAdamW(self._params, lr=LR, **options)
        return Way(optimizer.backward, optimizer.step, optimizer.zero_grad)

    def _torchjd(self, name: str) -> Way:
        import torchjd.aggregation
        from torchjd.autojac import backward, jac_to_grad

        optimizer = torch.optim.AdamW(self._params, lr=LR, fused=True)
        aggregator = getattr(torchjd.aggregation, name)()

        def step() -> None:
            jac_to_grad(self._params, aggregator)
            optimizer.step()

        # one pass after the other: the default, all at once, has no batched attention on a CPU (torch warns of it)
        return Way(lambda losses: backward(list(losses.values()), parallel_chunk_size=1), step, optimizer.zero_grad)

    def seconds(self, name: str, cached: bool = False) -> float:
        """Of one whole iteration, until the device is done; `cached`: with the teacher's predictions of before."""
        way = self.ways[name]
        if cached and self._target is None:
            self._target = self._pair.teach()

        def iteration() -> None:
            way.before()
            cached_target = self._target if cached else None
            way.backward(self._pair.losses(self._pair.teach() if cached_target is None else cached_target))
            way.step()
            if self._pair.device == "cuda":
                torch.cuda.synchronize()

        if self._pair.device == "cuda":
            torch.cuda.synchronize()
        return seconds_of(iteration)

    def run(self, name: str) -> dict[str, float]:
        """Seconds of the parts of one iteration and of the whole."""
        way = self.ways[name]
        way.before()
        losses: dict[str, Tensor] = {}

        def forward() -> None:
            losses.update(self._pair.losses(self._pair.teach()))

        seconds = {
            "forward": seconds_of(forward),
            "backward": seconds_of(lambda: way.backward(losses)),
            "step": seconds_of(way.step),
        }
        way.before()
        return {**seconds, "iteration": sum(seconds.values())}


def measure_iterations(
    student: str,
    teacher: str,
    *,
    batch: int,
    size: int,
    rounds: int,
    names: Sequence[str] | None = None,
    quiet_limit: float | None = None,
) -> list[Measurement]:
    """Milliseconds of the parts, and ratios to the iteration of the weighted sum in the same round."""
    iteration = Iteration(Pair(student, teacher, batch, size))
    chosen = list(iteration.ways if names is None else [SUM, *names])
    for name in chosen:  # warms up, and makes the one measurement of `Every`
        iteration.run(name)
    shuffle, quiet = random.Random(0), Quiet(quiet_limit)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for _ in range(rounds):
        order = shuffle.sample(chosen, len(chosen))
        found = quiet.run(lambda order=order: {name: iteration.run(name) for name in order})  # type: ignore[misc]
        for name, seconds in found.items():
            unit = found[SUM]["iteration"]
            more = {"ratio": seconds["iteration"] / unit}
            if "exact" in found:
                # what a second backward pass allows: the unit's iteration and one more of its backward passes
                more["ratio to sum and a second backward"] = seconds["iteration"] / (unit + found[SUM]["backward"])
                more["backward / exact's"] = seconds["backward"] / found["exact"]["backward"]
            taken[name].append({**seconds, **more})
    config = f"student {student}, teacher {teacher}, batch {batch}, {size} px, {rounds} rounds"

    def entry(name: str, metric: str, unit: str, values: Sequence[float]) -> Measurement:
        threads = torch.get_num_threads()
        return Measurement("iteration", name, f"batch {batch}", metric, unit, "", values, threads, config)

    results = [entry("other processes", "load", "cores", [quiet.load])]
    for name, runs in taken.items():
        for metric in runs[0]:
            is_time = metric in ("forward", "backward", "step", "iteration")
            values = [(1e3 if is_time else 1) * run[metric] for run in runs]
            results.append(entry(name, metric, "ms" if is_time else "1", values))
    return results


def overlap_step(case: Case, backend: str | None = None) -> Competitor:
    """`step` after hooks have taken the products: solve and update."""
    optimizer = optimizer_of(case, gram="overlap", backend=backend)
    sets = optimizer._sets
    watch = optimizer._source.watch(optimizer._options)
    assert watch is not None
    rows: list[list[Tensor | None]] = [list(row) for row in case.grads]
    sets.reach.begin(sets.names, sets.params)
    watch.start(rows, [True] * len(case.params), sets.reach)
    for t in reversed(range(len(case.params))):
        watch.ready(len(rows) - 1, t, case.grads[-1][t])
    watch.finish()
    sets.watch = watch
    return Competitor(optimizer.step, nothing)


#: Steps, from the end of backward to the end of step.
STEPS: Mapping[str, Callable[[Case], Competitor]] = {
    "fused": fused,
    "exact": dtokd,
    "overlap": overlap_step,
    "lag": lag_step,
}
