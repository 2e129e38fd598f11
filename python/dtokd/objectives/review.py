"""ReviewKD: deep stages of the student are fused into shallower ones before they are compared."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Objective
from .features import same_size
from .taps import Outputs, Taps

LEVELS = (4, 2, 1)


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """Weighted mean of mse at full size and pooled to 4, 2 and 1, weights 1, 1/2, 1/4, 1/8 (HCL). Infimum 0.

    Source: Chen et al., *Distilling Knowledge via Knowledge Review*, CVPR 2021.

    Args:
        student, teacher: [B, C, H, W], the same shape.
    """
    total, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for level in LEVELS:
        if level >= student.shape[2]:
            continue
        weight /= 2
        s, t = F.adaptive_avg_pool2d(student, level), F.adaptive_avg_pool2d(teacher, level)
        total = total + weight * F.mse_loss(s, t)
        weights += weight
    return total / weights


class Fusion(nn.Module):
    """Attention-based fusion of one stage with the fused deeper ones (ABF)."""

    def __init__(self, channels: int, width: int, teacher_channels: int, deepest: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.attend = None if deepest else nn.Conv2d(2 * width, 2, 1)
        self.expand = nn.Sequential(
            nn.Conv2d(width, teacher_channels, 3, padding=1, bias=False), nn.BatchNorm2d(teacher_channels)
        )

    def forward(self, x: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """(for the comparison [B, teacher's C, H, W], for the next shallower stage [B, width, H, W])."""
        x = self.reduce(x)
        if self.attend is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            a, b = self.attend(torch.cat([x, deeper], 1)).sigmoid().chunk(2, 1)
            x = x * a + deeper * b
        return self.expand(x), x


class Fusions(nn.Module):
    """A `Fusion` per stage, deep to shallow."""

    def __init__(self, channels: list[int], width: int, teacher_channels: list[int]) -> None:
        super().__init__()
        pairs = list(zip(channels, teacher_channels, strict=True))
        self.stages = nn.ModuleList([Fusion(s, width, t, i == len(pairs) - 1) for i, (s, t) in enumerate(pairs)])

    def forward(self, outputs: Outputs) -> list[Tensor]:
        """One map per stage, shallow to deep."""
        results: list[Tensor] = []
        deeper: Tensor | None = None
        for fuse, x in reversed(list(zip(self.stages, outputs.maps, strict=True))):
            result, deeper = fuse(x.float(), deeper)
            results.insert(0, result)
        return results


class Review(Objective):
    """Sum over stages of `hierarchical_context` between fused student maps and the teacher's. Infimum 0.

    Source: Chen et al., *Distilling Knowledge via Knowledge Review*, CVPR 2021. ReviewKD-style: they also compare the
    pooled features as a last stage, and resize the student's map up where it is smaller; here both go to the smaller
    size. Private: the fusions, with their BatchNorms.
    """

    def __init__(
        self,
        name: str,
        stages: tuple[tuple[int, ...], tuple[int, ...]],
        widths: tuple[list[int], list[int]],
        width: int | None,
    ) -> None:
        self.name = name
        self.head = Fusions(widths[0], width or min(512, widths[0][-1]), widths[1])
        self.student, self.teacher = Taps(logits=True, stages=stages[0]), Taps(stages=stages[1])

    def loss(self, student: Outputs, projected: object, teacher: Outputs, target: Any) -> Tensor:
        """The sum of the stages' `hierarchical_context`, as `Objective.loss`."""
        assert isinstance(projected, list)
        pairs = [same_size(s, t.float()) for s, t in zip(projected, teacher.maps, strict=True)]
        return sum((hierarchical_context(s, t) for s, t in pairs), pairs[0][0].new_zeros(()))
