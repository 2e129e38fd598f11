"""From the student's width to the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .taps import Outputs


class Householder(nn.Module):
    """Orthonormal rows or columns from a product of reflections, one per row or column of the smaller side.

    torch's `parametrizations.orthogonal` keeps signs on the parameter's diagonal and rounds them to integers: the first
    step with weight decay makes them 0.9999, then 0, and with them the whole matrix. Here nothing but the reflections'
    vectors is read, so whatever an optimizer does to the parameter, the matrix is orthonormal.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[n, m] of any numbers -> [n, m] orthonormal."""
        wide = x.shape[0] < x.shape[1]
        v = x.mT if wide else x
        v = v.tril(-1) + torch.eye(*v.shape, dtype=x.dtype, device=x.device)
        # all reflections at once (the compact WY form): torch.linalg.householder_product goes one by one in its
        # backward pass, about 20 s at 2048 x 1280 on one Xeon core
        products = v.mT @ v
        inverse_t = products.triu(1) + torch.diag(products.diagonal() / 2)
        first = v[: v.shape[1]].mT
        q = torch.eye(*v.shape, dtype=x.dtype, device=x.device) - v @ torch.linalg.solve_triangular(
            inverse_t, first, upper=True
        )
        return q.mT if wide else q


def make_projector(kind: str, width: int, teacher_width: int) -> nn.Module:
    """A linear map over the last dimension, in float32.

    "linear" is `nn.Linear` with a bias, and nothing where the widths agree, as in `timm.task`.

    "orthogonal" has orthonormal rows or columns and no bias: it can turn but not distort the student's features (Miles
    et al., *VkD: Improving Knowledge Distillation using Orthogonal Projections*, CVPR 2024). The paper's formula is the
    exponential of a skew-symmetric matrix of the larger width: for RegNetY-160's 3024 channels tens of products of
    3024 x 3024 matrices in every step, for a student of 192. Reflections (`Householder`) reach the same matrices, up to
    a sign where the widths agree, in products of the projector's own size.

    Args:
        kind: "linear" or "orthogonal".
        width: channels of the student.
        teacher_width: channels of the teacher.
    """
    if kind == "orthogonal":
        projector = nn.Linear(width, teacher_width, bias=False, dtype=torch.float32)
        nn.init.normal_(projector.weight)
        parametrize.register_parametrization(projector, "weight", Householder())
        return projector
    return nn.Identity() if width == teacher_width else nn.Linear(width, teacher_width, dtype=torch.float32)


class PooledProjector(nn.Module):
    """Projects `Outputs.pooled`: [B, width] -> [B, teacher's width]."""

    def __init__(self, kind: str, width: int, teacher_width: int) -> None:
        super().__init__()
        self.map = make_projector(kind, width, teacher_width)

    def forward(self, outputs: Outputs) -> Tensor:
        """[B, teacher's width]."""
        assert outputs.pooled is not None
        return self.map(outputs.pooled.float())


class MapProjector(nn.Module):
    """Projects each of `Outputs.maps` on its own (a 1x1 convolution): [B, C, H, W] -> [B, teacher's C, H, W]."""

    def __init__(self, kind: str, widths: list[int], teacher_widths: list[int]) -> None:
        super().__init__()
        pairs = zip(widths, teacher_widths, strict=True)
        self.maps = nn.ModuleList([make_projector(kind, s, t) for s, t in pairs])

    def forward(self, outputs: Outputs) -> list[Tensor]:
        """One map per stage."""
        pairs = zip(self.maps, outputs.maps, strict=True)
        return [linear(m.float().movedim(1, -1)).movedim(-1, 1) for linear, m in pairs]
