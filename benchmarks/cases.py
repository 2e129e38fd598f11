"""What is measured: inputs, built once, and the competitors that work on them.

A case holds parameters, AdamW's state and two gradients. All competitors update the same parameters and the same
state, so that none is lucky with its memory.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import dtokd_kernels as dk
from dtokd_kernels import implementations
from dtokd_kernels.sources import Exact, Source

Kind = Literal["interior", "vertex"]
Shapes = Sequence[tuple[int, ...]]

#: Short names of the models whose parameter shapes are used, and timm's.
MODELS = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "resnet50": "resnet50",
    "vit_base": "vit_base_patch16_224",
}
KINDS: tuple[Kind, ...] = ("interior", "vertex")
LR = 1e-3
MAX_NORM = 1.0
GRADIENT_NORM = 10.0  # so that clipping to MAX_NORM is active


def shapes_of(model: str) -> list[tuple[int, ...]]:
    """Shapes of a model's parameters: of MODELS from a file beside this one, of timm's other models from timm."""
    if model in MODELS:
        listed = json.loads(Path(__file__).with_name("shapes.json").read_text())
        return [tuple(shape) for shape in listed[model]]
    return timm_shapes(model)


def timm_shapes(model: str) -> list[tuple[int, ...]]:
    """Shapes of a timm model's parameters; no weights are made."""
    import timm  # the other way works without it

    with torch.device("meta"):
        return [tuple(p.shape) for p in timm.create_model(MODELS.get(model, model)).parameters()]


@dataclass(frozen=True)
class Case:
    """Inputs of one measurement.

    Attributes:
        params: the parameters.
        grads: two gradients, each a list of tensors.
        losses: [2], the objectives' values.
        state: AdamW's state, in torch's names.
        kind: "interior": random gradients, both weights positive; "vertex": aligned gradients of unequal length,
            so that the weight of the longer is exactly 0.
    """

    params: list[torch.nn.Parameter]
    grads: list[list[Tensor]]
    losses: Tensor
    state: defaultdict[Tensor, Any]
    kind: Kind

    @classmethod
    def build(cls, shapes: Shapes, kind: Kind, device: str = "cpu") -> Case:
        """The same inputs each time, float32."""
        generator = torch.Generator(device).manual_seed(0)
        numbers = sum(math.prod(shape) for shape in shapes)
        scale = GRADIENT_NORM / math.sqrt(numbers)

        def normal(std: float) -> list[Tensor]:
            return [torch.empty(shape, device=device).normal_(0, std, generator=generator) for shape in shapes]

        params = [torch.nn.Parameter(p) for p in normal(0.02)]
        first = normal(scale)
        if kind == "interior":
            second = normal(1.5 * scale)
        else:
            second = [noise.add_(g, alpha=2) for noise, g in zip(normal(0.1 * scale), first, strict=True)]
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for p in params:
            step = torch.tensor(0.0, device=device)
            state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return cls(params, [first, second], torch.tensor([2.3, 1.1], dtype=torch.float64, device=device), state, kind)

    @property
    def on_gpu(self) -> bool:
        """Whether the tensors are on a GPU, where AdamW keeps its step counters on the device (`capturable`)."""
        return self.params[0].is_cuda

    @property
    def parameters(self) -> int:
        """How many numbers the parameters hold."""
        return sum(p.numel() for p in self.params)

    @cached_property
    def jacobians(self) -> list[Tensor]:
        """What TorchJD's backward leaves: for each parameter the gradients of the log-losses, stacked."""
        scales = (1 / self.losses).tolist()
        return [
            torch.stack([g * scale for g, scale in zip(row, scales, strict=True)])
            for row in zip(*self.grads, strict=True)
        ]

    def restore(self, copy: list[Tensor]) -> None:
        """Write the first gradient to a copy of it that a step has overwritten."""
        torch._foreach_copy_(copy, self.grads[0])

    def set_grads(self, grads: Sequence[Tensor | None]) -> None:
        """Point `.grad` of the parameters at these tensors."""
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad


@dataclass(frozen=True)
class Traffic:
    """Bytes per parameter that the passes of one step read and write, counted from the code."""

    reads: int
    writes: int

    @property
    def total(self) -> int:
        """Read and written."""
        return self.reads + self.writes


@dataclass(frozen=True)
class Competitor:
    """One way to do the step.

    Attributes:
        step: what is timed: from gradients to updated parameters.
        prepare: what puts the inputs back before each step, not timed.
        traffic: None: not counted.
    """

    step: Callable[[], object]
    prepare: Callable[[], None]
    traffic: Traffic | None = None


def fill(optimizer: dk.DTOAdamW, losses: Tensor, grads: Sequence[Sequence[Tensor]]) -> None:
    """Give an optimizer its gradient sets, as `backward` would."""
    sets = optimizer._sets
    sets.names = tuple(map(str, range(len(grads))))
    sets.losses, sets.source = losses, optimizer._source
    sets.params = [p for group in optimizer.param_groups for p in group["params"]]
    sets.grads = [list(row) for row in grads]


def nothing() -> None:
    """Leave the inputs as they are."""


def optimizer_of(case: Case, **options: Any) -> dk.DTOAdamW:
    """AdamW of this project on the case's parameters and state, with its gradient sets."""
    optimizer = dk.DTOAdamW(case.params, lr=LR, max_norm=MAX_NORM, capturable=case.on_gpu, **options)
    optimizer.state = case.state
    fill(optimizer, case.losses, case.grads)
    return optimizer


def lag_step(case: Case, backend: str | None = None, check: bool = False) -> Competitor:
    """One pass over memory that updates and takes the products; the first step, an exact one, is behind.

    Args:
        case: the inputs.
        backend: of the optimizer.
        check: time the look for NaN and Inf too. In training it is a part of the backward passes, and finds each
            gradient in cache; so this is the most that it can cost.
    """
    optimizer = optimizer_of(case, gram="lag", backend=backend)

    def look() -> None:
        watch = optimizer._source.watch(optimizer._options)
        assert watch is not None
        watch.start(case.grads, [True] * len(case.params), optimizer._sets.reach)
        for i, row in enumerate(case.grads):
            for t, gradient in enumerate(row):
                watch.ready(i, t, gradient)
        watch.finish()
        optimizer._sets.watch = watch

    def look_and_step() -> None:
        look()
        optimizer.step()

    if check:
        return Competitor(look_and_step, nothing, Traffic(28, 12))
    look()
    return Competitor(optimizer.step, nothing, Traffic(20, 12))


class TwoLaunches(Exact):
    """The exact Gram matrix in a launch of its own: a small model's step takes one launch for `Exact` itself alone."""


def dtokd(case: Case, backend: str = "cpu", gram: Source | str = "exact") -> Competitor:
    """The balanced step of this project."""
    optimizer = optimizer_of(case, gram=gram, backend=backend)
    # Gram: both gradients. Update: parameters, two moments, and the gradients whose weight is not 0. In one launch it
    # depends on the chip how many gradients are read once
    one_launch = backend == "cuda" and gram == "exact" and case.parameters <= implementations.RESIDENT_PARAMETERS
    counted = backend != "reference" and not one_launch
    traffic = Traffic(28 if case.kind == "interior" else 24, 12) if counted else None
    return Competitor(optimizer.step, nothing, traffic)


def reference(case: Case) -> Competitor:
    """The same through plain PyTorch."""
    return dtokd(case, "reference")


def adamw(case: Case, **options: bool) -> torch.optim.AdamW:
    """AdamW of torch on the case's parameters and state."""
    optimizer = torch.optim.AdamW(case.params, lr=LR, capturable=case.on_gpu, **options)  # type: ignore[arg-type]
    optimizer.state = case.state
    return optimizer


def fused(case: Case) -> Competitor:
    """Fused AdamW of torch with one gradient: the unit of all ratios."""
    return Competitor(adamw(case, fused=True).step, lambda: case.set_grads(case.grads[0]), Traffic(16, 12))


def clip_fused(case: Case) -> Competitor:
    """clip_grad_norm_ and fused AdamW with one gradient."""
    optimizer = adamw(case, fused=True)
    grads = [g.clone() for g in case.grads[0]]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(case.params, MAX_NORM)
        optimizer.step()

    # norm: reads 4; scaling: reads 4, writes 4; fused AdamW as above
    return Competitor(step, lambda: case.set_grads(grads), Traffic(24, 16))


def foreach_gram(grads: Sequence[Sequence[Tensor]]) -> list[float]:
    """g_11, g_12, g_22 without temporaries: there is no foreach dot, and a foreach product is stored."""
    first, second = grads
    norms = [torch.stack(torch._foreach_norm(list(row))).double().square().sum() for row in (first, second)]
    dots = [torch.dot(a.view(-1), b.view(-1)) for a, b in zip(first, second, strict=True)]
    return [float(norms[0]), float(torch.stack(dots).double().sum()), float(norms[1])]


def two_coefficients(gram: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """What multiplies two raw gradients: DTO-KD's closed form (Eq. 11, 12) and clipping, in Python numbers."""
    g11, g12, g22 = gram
    a, b = 1 / losses[0], 1 / losses[1]
    u11, u12, u22 = a * a * g11, a * b * g12, b * b * g22
    second = min(max((u11 - u12) / (u11 + u22 - 2 * u12), 0.0), 1.0)
    c, d = (1 - second) * a, second * b
    norm = math.sqrt(c * c * g11 + 2 * c * d * g12 + d * d * g22)
    clip = min(1.0, MAX_NORM / (norm + 1e-6))
    return c * clip, d * clip


def foreach_fused(case: Case) -> Competitor:
    """The best that torch's own operations gave: foreach passes in place, then fused AdamW.

    The combination is one lerp; its scale, clipping included, goes through the fused kernel's `grad_scale`.
    """
    optimizer: Any = adamw(case, fused=True)
    first, second = [g.clone() for g in case.grads[0]], case.grads[1]
    losses = case.losses.tolist()

    @torch.no_grad()
    def step() -> None:
        c, d = two_coefficients(foreach_gram([first, second]), losses)
        case.set_grads(first if c > 0 else second)
        if c > 0 and d > 0:
            torch._foreach_lerp_(first, second, d / (c + d))
        optimizer.grad_scale = torch.tensor(1 / (c + d), device=first[0].device)
        optimizer.step()

    # norms and dots: reads 16; lerp: reads 8, writes 4; fused AdamW also writes the scaled gradient
    traffic = Traffic(40, 20) if case.kind == "interior" else Traffic(32, 16)
    return Competitor(step, lambda: case.restore(first), traffic)


def foreach(case: Case) -> Competitor:
    """Foreach operations alone: as `foreach_fused`, but with AdamW(foreach=True)."""
    optimizer = adamw(case, foreach=True)
    first, second = [g.clone() for g in case.grads[0]], case.grads[1]
    losses = case.losses.tolist()

    @torch.no_grad()
    def step() -> None:
        c, d = two_coefficients(foreach_gram([first, second]), losses)
        grads = first if c > 0 else second
        torch._foreach_mul_(grads, c or d)
        if c > 0 and d > 0:
            torch._foreach_add_(grads, second, alpha=d)
        case.set_grads(grads)
        optimizer.step()

    # norms and dots: reads 16; scaling: reads 4, writes 4; addition: reads 8, writes 4; the eight passes of
    # AdamW(foreach=True): reads 48, writes 32
    traffic = Traffic(76, 40) if case.kind == "interior" else Traffic(68, 36)
    return Competitor(step, lambda: case.restore(first), traffic)


def torchjd(case: Case, name: str, optimize: bool) -> Competitor:
    """TorchJD's jac_to_grad with the aggregator of this name, then clipping and fused AdamW."""
    import torchjd.aggregation  # the other competitors run without it
    from torchjd.autojac import jac_to_grad

    aggregator = getattr(torchjd.aggregation, name)()
    optimizer = adamw(case, fused=True)
    tensors: list[Any] = list(case.params)

    def prepare() -> None:
        for p, jacobian in zip(tensors, case.jacobians, strict=True):
            p.grad, p.jac = None, jacobian

    def step() -> None:
        jac_to_grad(tensors, aggregator, optimize_gramian_computation=optimize)
        torch.nn.utils.clip_grad_norm_(tensors, MAX_NORM)
        optimizer.step()

    return Competitor(step, prepare)


#: The name in the results, and how to make it; fast ones first.
COMPETITORS: dict[str, Callable[[Case], Competitor]] = {
    "fused": fused,
    "clip_fused": clip_fused,
    "dtokd": dtokd,
    "foreach_fused": foreach_fused,
    "foreach": foreach,
    "reference": reference,
    "mgda": lambda case: torchjd(case, "MGDA", False),
    "mgda_gramian": lambda case: torchjd(case, "MGDA", True),
    "upgrad": lambda case: torchjd(case, "UPGrad", False),
    "upgrad_gramian": lambda case: torchjd(case, "UPGrad", True),
}
UNIT = "fused"
SLOW = ("reference", "mgda", "mgda_gramian", "upgrad", "upgrad_gramian")

TITLES = {
    "fused": "torch fused AdamW, one gradient (unit)",
    "clip_fused": "torch clip_grad_norm_ + fused AdamW, one gradient",
    "dtokd": "dtokd: DTOAdamW, two gradients",
    "foreach_fused": "foreach Gram and combination + fused AdamW",
    "foreach": "foreach Gram and combination + foreach AdamW",
    "reference": "dtokd, backend reference",
    "mgda": "TorchJD MGDA + clip + fused AdamW",
    "mgda_gramian": "TorchJD MGDA (optimized Gramian) + clip + fused AdamW",
    "upgrad": "TorchJD UPGrad + clip + fused AdamW",
    "upgrad_gramian": "TorchJD UPGrad (optimized Gramian) + clip + fused AdamW",
}
