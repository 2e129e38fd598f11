"""PHI standardisation: features of teachers with different scales become comparable targets."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UsageError
from .memory import of_all_ranks


@functools.lru_cache(maxsize=8)
def hadamard(order: int) -> Tensor | None:
    """A matrix of 1 and -1 with orthogonal rows, int8; None where no construction used here has this order.

    Sources: Sylvester's doubling and products, and both constructions of Paley (*On Orthogonal Matrices*, 1933) for
    primes. They reach the usual widths of networks: all powers of 2, 12, 20, 24 and 28 times such, 1408, 1664, 3024.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if order == 2:
        return _matrix([[1, 1], [1, -1]])
    if order % 4:
        return None
    if _is_prime(q := order - 1):  # Paley's first, as q is 3 modulo 4
        core = torch.ones(order, order, dtype=torch.int8)
        core[0, 0], core[1:, 0], core[1:, 1:] = 0, -1, _residues(q)
        return core + torch.eye(order, dtype=torch.int8)
    if (q := order // 2 - 1) % 4 == 1 and _is_prime(q):  # Paley's second
        core = torch.ones(order // 2, order // 2, dtype=torch.int8)
        core[0, 0], core[1:, 1:] = 0, _residues(q)
        identity = torch.eye(order // 2, dtype=torch.int8)
        return torch.kron(core, _matrix([[1, 1], [1, -1]])) + torch.kron(identity, _matrix([[1, -1], [-1, -1]]))
    for factor in range(2, int(order**0.5) + 1):
        if order % factor == 0:
            first, second = hadamard(factor), hadamard(order // factor)
            if first is not None and second is not None:
                return torch.kron(first, second)
    return None


def _matrix(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int8)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _residues(q: int) -> Tensor:
    """[q, q] of whether the difference of row and column is a square modulo q: 1, -1, and 0 on the diagonal."""
    character = torch.full((q,), -1, dtype=torch.int8)
    character[torch.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    numbers = torch.arange(q)
    return character[(numbers[:, None] - numbers) % q]


class Phi(nn.Module):
    """One feature of a teacher, standardised: y = H U^T (x - mu) / phi.

    mu is the features' mean, U the eigenvectors of their covariance, H a Hadamard matrix of length 1 rows, and phi^2
    the mean variance of a channel. Each channel of y has mean 0 and variance 1, and distances keep their ratios: all
    channels are scaled by the same number. So a mean square error is near 1 at first, whatever the teacher.

    Source: Ranzinger et al., *PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation*, 2024,
    arXiv 2410.01680.

    The statistics are those of the batches between the first `observe` and `settle`, of all ranks, and stay as they
    are then. They are buffers: part of a checkpoint, which brings back the same bits.

    Args:
        width: channels.

    Raises:
        UsageError: there is no Hadamard matrix of this width.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if hadamard(width) is None:
            raise UsageError(
                f"--kd-feature-norm phi-s: it needs a Hadamard matrix of the teacher's {width} channels, and none is "
                "known here; take --kd-feature-norm standardize or layernorm, or other --kd-teacher-stages"
            )
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("turn", torch.eye(width))
        self.mean: Tensor
        self.turn: Tensor
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def observe(self, feature: Tensor) -> None:
        """Add the rows of a batch, [B, C] or [B, C, H, W], to the statistics."""
        # MPS has no float64
        exact = feature.device if feature.device.type != "mps" else torch.device("cpu")
        rows = feature.movedim(1, -1).flatten(0, -2).to(exact, torch.float64)
        if not self._sums:
            self._sums = [rows.new_zeros(()), rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1:] * 2)]
        count, total, products = self._sums
        self._sums = [count + len(rows), total + rows.sum(0), products.addmm_(rows.mT, rows)]

    @torch.no_grad()
    def settle(self) -> None:
        """Fix mean and matrix by what was observed on all ranks. All ranks call it.

        Raises:
            UsageError: the features do not vary, or are not finite.
        """
        count, total, products = (of_all_ranks(part[None]).sum(0).cpu() for part in self._sums)
        self._sums = []
        mean = total / count
        covariance = products / count - mean.outer(mean)
        scale = (covariance.trace() / len(mean)).clamp_min(0).sqrt()
        if not scale.isfinite() or scale <= 1e-6 * mean.abs().max():
            raise UsageError(
                "--kd-feature-norm phi-s: the teacher's features are the same for all images, or not finite; take "
                "other --kd-teacher-stages, or another teacher"
            )
        _, axes = torch.linalg.eigh(covariance)
        matrix = hadamard(len(mean))
        assert matrix is not None
        self.mean.copy_(mean)
        self.turn.copy_(axes @ matrix.mT.double() / len(mean) ** 0.5 / scale)
        if dist.is_available() and dist.is_initialized():
            for buffer in (self.mean, self.turn):  # processors of another kind may find other eigenvectors
                dist.broadcast(buffer, 0)

    def forward(self, feature: Tensor) -> Tensor:
        """The standardised feature, of the same shape; before `settle` as it is."""
        return ((feature.movedim(1, -1) - self.mean) @ self.turn).movedim(-1, 1)


class PhiS(nn.Module):
    """A `Phi` for each feature of an objective.

    Args:
        widths: channels of each.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.features = nn.ModuleList([Phi(width) for width in widths])
        self.register_buffer("known", torch.tensor(False))
        self.known: Tensor
        self._known = False  # as the buffer, which may be on a device

    @property
    def settled(self) -> bool:
        """Whether there are statistics. Waits for the device until there are."""
        self._known = self._known or bool(self.known)
        return self._known

    def observe(self, features: Sequence[Tensor]) -> None:
        """Add a batch to the statistics."""
        for each, feature in zip(self.features, features, strict=True):
            assert isinstance(each, Phi)
            each.observe(feature)

    def settle(self) -> None:
        """Fix them. All ranks call it."""
        for each in self.features:
            assert isinstance(each, Phi)
            each.settle()
        self.known.fill_(True)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The standardised features."""
        return [each(feature) for each, feature in zip(self.features, features, strict=True)]
