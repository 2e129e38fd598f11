"""No numbers for wrong results: every competitor against float64 before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import dtokd_kernels as dk

from .cases import COMPETITORS, KINDS, LR, MAX_NORM, Case, Competitor, Kind, Shapes, foreach_gram

SHAPES: Shapes = ((33, 7), (130,), (5, 3, 3, 3), (1,), (64, 64))
STEPS = 3


def upgrad_weights(gram: Tensor) -> Tensor:
    """UPGrad for two gradients: the mean of both, each projected off the other where they conflict."""
    conflict = gram[0, 1].clamp(max=0)
    return (1 - conflict / gram.diagonal()) / 2


def expected_coefficients(name: str, case: Case) -> Tensor:
    """What a competitor should multiply the two raw gradients with, by the float64 reference."""
    with dk.use_backend("reference"):
        gram = dk.gram([[g.double() for g in row] for row in case.grads])
        if name == "fused":
            return torch.tensor([1.0, 0.0], dtype=torch.float64, device=gram.device)
        if name == "clip_fused":
            alone = dk.balance(gram[:1, :1], [1.0], max_norm=MAX_NORM).coefficients
            return torch.cat([alone, torch.zeros_like(alone)])
        weighting = upgrad_weights if name.startswith("upgrad") else None
        return dk.balance(gram, case.losses, weighting, max_norm=MAX_NORM).coefficients


def expected_update(name: str, case: Case) -> list[dict[str, Tensor]]:
    """Parameter and moments after STEPS steps, each tensor's in a dict: torch's AdamW in float64."""
    coefficients = expected_coefficients(name, case)
    params = [torch.nn.Parameter(p.detach().double()) for p in case.params]
    for p, *row in zip(params, *case.grads, strict=True):
        p.grad = sum((c * g.double() for c, g in zip(coefficients, row, strict=True)), torch.zeros_like(p))
    optimizer = torch.optim.AdamW(params, lr=LR, foreach=False)
    for _ in range(STEPS):
        optimizer.step()
    return [{"param": p.detach(), **optimizer.state[p]} for p in params]


def check(competitors: Mapping[str, Callable[[Case], Competitor]] = COMPETITORS, device: str = "cpu") -> None:
    """Run every competitor on small inputs of both kinds.

    Raises:
        AssertionError: one differs from the float64 reference; the text names it, and by how much it differs.
    """
    for kind in KINDS:
        case = Case.build(SHAPES, kind, device=device)
        gram = dk.gram(case.grads, backend="reference")
        vertex = bool(dk.balance(gram, case.losses).vertex)
        assert vertex == (kind == "vertex"), f"gate: the {kind} case is none: vertex is {vertex}"
        entries = torch.stack([gram[0, 0], gram[0, 1], gram[1, 1]])
        torch.testing.assert_close(torch.tensor(foreach_gram(case.grads)).double(), entries.cpu(), rtol=1e-5, atol=1e-4)
        for name, make in competitors.items():
            _check_one(name, make, kind, device)


def _check_one(name: str, make: Callable[[Case], Competitor], kind: Kind, device: str) -> None:
    case = Case.build(SHAPES, kind, device=device)
    expected = expected_update(name, case)
    competitor = make(case)
    for _ in range(STEPS):
        competitor.prepare()
        competitor.step()
    # UPGrad's solver adds 1e-4 to the normalized Gram; the others differ by float32 rounding of sums
    rtol = 1e-3 if name.startswith("upgrad") else 1e-5
    for p, values in zip(case.params, expected, strict=True):
        got = {"param": p.detach(), **case.state[p]}
        for key, value in values.items():
            torch.testing.assert_close(
                got[key].double(),
                value.double(),
                rtol=rtol,
                atol=rtol * float(value.abs().max()),
                check_device=False,  # torch counts steps on the CPU
                msg=lambda text, key=key: f"gate: {name}, {kind} case, {key}: {text}",  # type: ignore[misc]
            )
