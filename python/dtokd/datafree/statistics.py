"""What a teacher remembers of its training images: the running statistics of its batch normalisation."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

#: As torch begins; a layer whose variance is still this, and whose mean is 0, has seen no image.
_START = 1.0


class NoStatistics(ValueError):
    """A teacher that remembers nothing of its images."""


class BatchStatistics:
    """Compares the statistics of a batch with those that the teacher's layers keep.

    Inside a `with` block each forward pass of the teacher leaves a loss: the sum over layers of the length of the
    difference of means, and of that of variances. Infimum 0.

    Source: DeepInversion (Yin et al., CVPR 2020), Eq. 4; with `momentum` as in Fast-DFKD (Fang et al., AAAI 2022): the
    batch stands for a part of an average over earlier batches, so that a small batch need not have all by itself.

    Args:
        model: the teacher.
        momentum: the part of the average over earlier batches, from 0 to below 1.

    Raises:
        NoStatistics: no layer has running statistics, they are those of an untrained model, or they are not finite.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.0) -> None:
        self.layers = layers_of(model)
        self.momentum = momentum
        self._before: list[tuple[Tensor, Tensor] | None] = [None] * len(self.layers)
        self._now: list[tuple[Tensor, Tensor] | None] = [None] * len(self.layers)
        self._losses: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> BatchStatistics:
        self._handles = [layer.register_forward_pre_hook(self._hook(i)) for i, layer in enumerate(self.layers)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._losses = [], []

    def _hook(self, index: int) -> Any:
        def compare(layer: Any, inputs: tuple[Tensor, ...]) -> None:
            maps = inputs[0].float()
            others = [dim for dim in range(maps.ndim) if dim != 1]
            mean, variance = maps.mean(others), maps.var(others, unbiased=False)
            self._now[index] = (mean.detach(), variance.detach())
            before = self._before[index]
            if before is not None:
                mean = (1 - self.momentum) * mean + self.momentum * before[0]
                variance = (1 - self.momentum) * variance + self.momentum * before[1]
            self._losses.append(
                (mean - layer.running_mean.float()).norm() + (variance - layer.running_var.float()).norm()
            )

        return compare

    def take(self) -> Tensor:
        """The loss of the forward pass before, a scalar."""
        losses, self._losses = self._losses, []
        return torch.stack(losses).sum()

    @torch.no_grad()
    def remember(self) -> None:
        """Add the batch of the last forward pass to the average, if there is one."""
        if not self.momentum:
            return
        for i, (now, before) in enumerate(zip(self._now, self._before, strict=True)):
            if now is not None:
                self._before[i] = now if before is None else _mixed(before, now, self.momentum)

    def state_dict(self) -> dict[str, Any]:
        """The average over earlier batches."""
        return {"before": [None if pair is None else list(pair) for pair in self._before]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        devices = [layer.running_mean.device for layer in self.layers]
        self._before = [
            None if pair is None else (pair[0].to(device), pair[1].to(device))
            for pair, device in zip(state["before"], devices, strict=True)
        ]


def _mixed(before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor], momentum: float) -> tuple[Tensor, Tensor]:
    return tuple(momentum * old + (1 - momentum) * new for old, new in zip(before, now, strict=True))  # type: ignore[return-value]


def layers_of(model: nn.Module) -> list[Any]:
    """The layers with running statistics.

    Raises:
        NoStatistics: as `BatchStatistics`.
    """
    found: list[Any] = [m for m in model.modules() if _is_kept(m, "running_mean") and _is_kept(m, "running_var")]
    if not found:
        raise NoStatistics(
            f"{type(model).__name__} has no batch normalisation with running statistics (as transformers with layer "
            "normalisation have none), so it has no record of what its training images were like; choose a teacher "
            "with batch normalisation, such as a ResNet, a RegNet or an EfficientNet"
        )
    kept = torch.stack([torch.stack([m.running_mean.float().abs().max(), _farthest(m.running_var)]) for m in found])
    if not bool(kept.isfinite().all()):
        raise NoStatistics(f"the running statistics of {type(model).__name__} are not finite; choose other weights")
    if not bool(kept.any()):
        raise NoStatistics(
            f"the running statistics of {type(model).__name__} are those of a model that has seen no image; pass the "
            "weights of a trained one"
        )
    return found


def _is_kept(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), Tensor)


def _farthest(variance: Tensor) -> Tensor:
    return (variance.float() - _START).abs().max()
