"""Whether the fused step and the reference step do the same.

Two runs that differ by one rounding part ways within a hundred iterations, as training is chaotic, so no bound on
their distance can be derived. Here both steps start from the same state each time: what then differs is rounding
alone, and rounding has bounds.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from timm.task import TrainingTask
from torch import Tensor

import dtokd_kernels as dk

from ..train.optimizer import make_stepper
from ..train.progress import Progress
from ..train.run import prepare
from ..train.rundir import RunDir
from ..train.steps import losses_of
from ..train.world import World

UNIT32, UNIT64 = 2.0**-24, 2.0**-53


@dataclass(frozen=True)
class Agreement:
    """How far the two steps are apart.

    Attributes:
        weights: largest difference of a weight, over all steps.
        weights_allowed: what rounding may explain, at the step that came closest to it.
        update: length of the difference between the parameters after a step, over the length of the step; the
            median over the steps, as where two gradients cancel rounding may turn a sign, and AdamW's first steps
            turn that into a whole step of one parameter.
        update_allowed: what rounding may explain, likewise.
    """

    weights: float
    weights_allowed: float
    update: float
    update_allowed: float

    @property
    def holds(self) -> bool:
        """Whether rounding explains all differences."""
        return self.weights <= self.weights_allowed and self.update <= self.update_allowed

    def __str__(self) -> str:
        return (
            f"the fused step and the reference {'agree' if self.holds else 'DISAGREE'}: from the same state, weights "
            f"differ by {self.weights:.1g} (allowed {self.weights_allowed:.1g}), updates by {self.update:.1g} of their "
            f"length (allowed {self.update_allowed:.1g})"
        )


def compare_steps(options: argparse.Namespace, steps: int) -> Agreement:
    """Take the first steps of a run by the fused step and by the reference, each time from the same state.

    Args:
        options: of `train.options`, of a student that is balanced by dtoadamw with two objectives.
        steps: how many.

    Effects: seeds the random generators, as `train` does.
    """
    progress = Progress(options.epochs)
    progress.console.quiet = True
    with TemporaryDirectory() as folder:
        task, loaders, device, *_ = prepare(options, RunDir(Path(folder)), World(), progress)
    twin = copy.deepcopy(task)
    sides = [(task, make_stepper(options, task, device)), (twin, make_stepper(options, twin, device))]
    fused = dk.backend_info()["chosen for cpu"].split()[0]
    weights, updates = [], []
    for images, labels in islice(loaders.train, steps):
        before = _flat(task)
        losses = {}
        for (side, stepper), backend in zip(sides, (fused, "reference"), strict=True):
            side.train()
            with dk.use_backend(backend):
                result = side(images, labels)
                losses = losses_of(result)
                stepper.backward(result, 1)
                stepper.step()
        ours, theirs = (stepper.balance for _, stepper in sides)
        assert ours is not None
        assert theirs is not None
        parameters, expected = _flat(task), _flat(twin)
        difference = float((ours.weights - theirs.weights).abs().max())
        values = torch.stack([loss.detach() for loss in losses.values()])
        weights.append((difference, _weights_allowed(theirs, values, len(expected))))
        length = (expected - before).norm()
        updates.append((float((parameters - expected).norm() / length), _update_allowed(expected, length)))
        twin.load_state_dict(task.state_dict())
        # a copy: torch's load_state_dict keeps the tensors it is given, and the two would share their moments
        sides[1][1].load_state_dict(copy.deepcopy(sides[0][1].state_dict()))
    closest = max(weights, key=lambda pair: pair[0] / pair[1])
    return Agreement(max(w for w, _ in weights), closest[1], *(median(column) for column in zip(*updates, strict=True)))


def _weights_allowed(balance: dk.Balance, losses: Tensor, n: int) -> float:
    """Bound on the weights' difference when every entry of the Gram matrix has been summed in its own order.

    A float64 sum of n products of entries of g_i and g_j is off by at most n u |g_i| |g_j|, whatever the order (u:
    `UNIT64`). With h = (|g_1|, |g_2|) the norms of the log-gradients and D = |g_1 - g_2|^2, the numerator of Eq. 11 is
    then off by at most n u h_2 (h_1 + h_2) and its denominator D by n u (h_1 + h_2)^2, so a weight in [0, 1] by
    2 n u (h_1 + h_2)^2 / D; clamping brings numbers no further apart. Twice this, as both sides round.
    """
    h = balance.norms / losses.double()
    squared_distance = h.square().sum() - 2 * balance.cosine[0, 1] * h.prod()
    return float((4 * n * UNIT64 * h.sum().square() / squared_distance.clamp(min=1e-300)).clamp(max=1))


def _update_allowed(parameters: Tensor, length: Tensor) -> float:
    """Bound on the difference of the parameters over the length of the step that led to them.

    A parameter is rounded to float32 after the decay and after the update, on both sides: 4 roundings of its size.
    The update itself is a chain of about 16 operations; 64 roundings of its size leave room for the cancellation in
    the sum of the gradients and in the moments.
    """
    return float(UNIT32 * (4 * parameters.norm() + 64 * length) / length)


def _flat(task: TrainingTask) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in task.parameters() if p.requires_grad])
