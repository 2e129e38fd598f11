"""From a teacher to images: the methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dtokd_kernels import DTOAdamW
from dtokd_kernels.types import Balance, Weighting

from ..errors import Diverged
from .augment import Augment
from .generator import Generator
from .losses import ImageLosses

#: Takes the record of each step of the optimizer, and the values of the three losses.
Watch = Callable[[Balance, dict[str, Tensor]], None]


@dataclass(frozen=True)
class Settings:
    """What both methods have.

    Attributes:
        size: channels, height and width of the images.
        mean, std: of the student's normalisation, a number for each channel.
        classes: of teacher and student.
        batch: images made at a time.
        steps: of the optimizer for each batch.
        lr: its learning rate.
        augment: how the models see the images while they are made.
        device: where they are made.
    """

    size: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]
    classes: int
    batch: int
    steps: int
    lr: float
    augment: Augment
    device: torch.device | str = "cpu"

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] as the student takes them."""
        return (pixels - self._row(self.mean)) / self._row(self.std)

    def pixels(self, images: Tensor) -> Tensor:
        """The other way."""
        return images * self._row(self.std) + self._row(self.mean)

    def _row(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.device).view(1, -1, 1, 1)


class Synthesis(Protocol):
    """A method."""

    @property
    def weighting(self) -> Weighting:
        """What balances the losses."""

    def make(self, watch: Watch) -> tuple[Tensor, Tensor]:
        """A batch.

        Args:
            watch: is shown each step.

        Returns:
            Images [B, C, H, W] in [0, 1] and the class that each was made for [B].

        Raises:
            Diverged: no step of the batch was finite, or its images are not.
            ValueError: the weighting refuses a loss.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that later batches depend on, besides the models and torch's random generator."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class _Optimised:
    """What is optimised by a balanced optimizer."""

    def __init__(self, settings: Settings, losses: ImageLosses, optimizer: DTOAdamW) -> None:
        self._settings, self._losses, self._optimizer = settings, losses, optimizer

    @property
    def weighting(self) -> Weighting:
        """What balances the losses."""
        return self._optimizer.weighting

    def state_dict(self) -> dict[str, Any]:
        """Of optimizer and statistics."""
        return {"optimizer": self._optimizer.state_dict(), "statistics": self._losses.statistics.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, at the learning rates of the settings."""
        rates = [group["lr"] for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._losses.statistics.load_state_dict(state["statistics"])


class Inversion(_Optimised):
    """Each batch is optimised from noise, as a parameter.

    Source: DeepInversion (Yin et al., CVPR 2020): confidence, batch statistics with a prior on pixels, and, as in
    Adaptive DeepInversion, disagreement with the student.

    Args:
        settings: of the images.
        losses: of them.
        weighting: balances these.
        gram: of `dtokd_kernels.DTOAdamW`.
    """

    def __init__(self, settings: Settings, losses: ImageLosses, weighting: Weighting, gram: Any = None) -> None:
        self._images = nn.Parameter(torch.zeros(settings.batch, *settings.size, device=settings.device))
        super().__init__(
            settings, losses, _optimizer([{"params": [self._images]}], settings.lr, (0.5, 0.9), weighting, gram)
        )

    def make(self, watch: Watch) -> tuple[Tensor, Tensor]:
        """See `Synthesis`."""
        settings = self._settings
        labels = torch.randint(0, settings.classes, (settings.batch,), device=settings.device)
        ends = [settings.normalise(torch.full((1, settings.size[0], 1, 1), v, device=settings.device)) for v in (0, 1)]
        with torch.no_grad():
            self._images.normal_().clamp_(*ends)
        _forget(self._optimizer)
        before = self._optimizer.skipped_steps
        with self._losses.statistics:
            for _ in range(settings.steps):
                losses = self._losses(settings.augment(self._images), labels, self._images)
                _take_step(self._optimizer, losses, watch)
                with torch.no_grad():
                    self._images.clamp_(*ends)
            self._losses.statistics.remember()
        pixels = settings.pixels(self._images.detach())
        _check(self._optimizer.skipped_steps - before, settings.steps, pixels, losses)
        return pixels, labels


class Fast(_Optimised):
    """A generator that learns to be a good start: from it a copy and the codes of a batch are optimised a few steps.

    After each batch the generator's parameters move a part of the way to the copy's.

    Source: Fast-DFKD (Fang et al., *Up to 100x Faster Data-free Knowledge Distillation*, AAAI 2022), Algorithm 1, with
    the update of Reptile (Nichol et al., 2018), which they compare in section 4.3.

    Args:
        settings: of the images.
        losses: of them.
        weighting: balances these.
        generator: the start; it is moved to the settings' device.
        latent_lr: learning rate of the codes.
        rate: the part of the way to the copy, in (0, 1].
        gram: of `dtokd_kernels.DTOAdamW`.
    """

    def __init__(
        self,
        settings: Settings,
        losses: ImageLosses,
        weighting: Weighting,
        generator: Generator,
        *,
        latent_lr: float,
        rate: float,
        gram: Any = None,
    ) -> None:
        self._rate = rate
        self.generator = generator.to(settings.device)
        self._copy = Generator(settings.size, generator.latent, generator.norm.num_features // 2).to(settings.device)
        self._codes = nn.Parameter(torch.zeros(settings.batch, generator.latent, device=settings.device))
        groups: list[dict[str, Any]] = [
            {"params": list(self._copy.parameters())},
            {"params": [self._codes], "lr": latent_lr},
        ]
        super().__init__(settings, losses, _optimizer(groups, settings.lr, (0.5, 0.999), weighting, gram))

    def make(self, watch: Watch) -> tuple[Tensor, Tensor]:
        """See `Synthesis`; the images are those of the step before the last one."""
        settings = self._settings
        labels = torch.randint(0, settings.classes, (settings.batch,), device=settings.device)
        self._copy.load_state_dict(self.generator.state_dict())
        with torch.no_grad():
            self._codes.normal_()
        _forget(self._optimizer)
        before = self._optimizer.skipped_steps
        with self._losses.statistics:
            for _ in range(settings.steps):
                pixels = self._copy(self._codes)
                losses = self._losses(settings.augment(settings.normalise(pixels)), labels)
                _take_step(self._optimizer, losses, watch)
            self._losses.statistics.remember()
        _check(self._optimizer.skipped_steps - before, settings.steps, pixels, losses)
        with torch.no_grad():
            for own, copied in zip(_floats(self.generator), _floats(self._copy), strict=True):
                own.lerp_(copied, self._rate)
        return pixels.detach(), labels

    def state_dict(self) -> dict[str, Any]:
        """Of generator, optimizer and statistics."""
        return {"generator": dict(self.generator.state_dict()), **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.generator.load_state_dict(state["generator"])
        super().load_state_dict(state)


def _floats(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and running statistics."""
    return (value for value in module.state_dict().values() if value.is_floating_point())


def _optimizer(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], weighting: Weighting, gram: Any
) -> DTOAdamW:
    return DTOAdamW(groups, lr=lr, betas=betas, weight_decay=0.0, weighting=weighting, gram=gram)


def _forget(optimizer: DTOAdamW) -> None:
    """Begin anew with the moments; what the weighting remembers stays."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def _take_step(optimizer: DTOAdamW, losses: dict[str, Tensor], watch: Watch) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    optimizer.backward(losses, inputs=params)  # teacher and student get no gradients
    optimizer.step()
    assert optimizer.balance is not None
    watch(optimizer.balance, {name: loss.detach() for name, loss in losses.items()})


def _check(skipped: Tensor, steps: int, pixels: Tensor, losses: dict[str, Tensor]) -> None:
    """Raises Diverged, see `Synthesis.make`."""
    if int(skipped) < steps and bool(pixels.isfinite().all()):
        return
    bad = [name for name, loss in losses.items() if not bool(loss.isfinite())] or ["a gradient"]
    raise Diverged(
        f"--data-free: none of the {steps} steps of a batch of images was finite ({', '.join(bad)} was not); no image "
        "of it was kept, and the checkpoints of the finished epochs are as they were: lower --df-lr, or the student's "
        "--lr, and go on with --resume auto"
    )


@contextmanager
def judging(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode, without gradients of their parameters; afterwards as they were."""
    modes = [(m, m.training) for model in models for m in model.modules()]
    needed = [p for model in models for p in model.parameters() if p.requires_grad]
    try:
        for model in models:
            model.eval()
        for p in needed:
            p.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p in needed:
            p.requires_grad_(True)
