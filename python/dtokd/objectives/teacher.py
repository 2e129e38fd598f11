"""A frozen teacher: its weights, its own view of the student's images, its forward pass."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_state_dict
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from ..files import digest_of
from .taps import Outputs, Taps, detach_copy, read


@dataclass(frozen=True)
class Normalisation:
    """How images were normalised: (pixel in [0, 1] - mean) / std per channel."""

    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    @classmethod
    def of(cls, model: nn.Module) -> Normalisation:
        """That of a timm model's `pretrained_cfg`; ImageNet's for others, as in `timm.task`."""
        cfg: dict[str, Any] = getattr(unwrap_model(model), "pretrained_cfg", None) or {}
        mean, std = cfg.get("mean", IMAGENET_DEFAULT_MEAN), cfg.get("std", IMAGENET_DEFAULT_STD)
        return cls(tuple(mean), tuple(std))


class Teacher:
    """A model that is only read.

    It is no `nn.Module`: a task that holds it has no teacher in its state_dict, parameters, EMA or `train()`. Its
    parameters are frozen, it stays in eval mode, so BatchNorm statistics stay too. The forward pass runs in inference
    mode; what comes out are ordinary float32 tensors, because a loss must be able to save them for its backward pass.

    Args:
        model: the network with its weights.
        name: for messages and names of objectives.
        student: normalisation of the images it will be given.
        dtype: of weights and forward pass, outside any autocast; None leaves both as they are.
        compile: torch.compile the forward pass.
        size: height and width the images are resized to (bicubic, antialiased); None leaves them.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        student: Normalisation,
        *,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name, self.dtype, self.size = name, dtype, size
        if dtype is not None:
            self.model.to(dtype)
        self.normalisation = Normalisation.of(model)
        self._renormalise = None if self.normalisation == student else (student, self.normalisation)
        self._read: Callable[[nn.Module, Tensor, Taps], Outputs] = torch.compile(read) if compile else read

    def to(self, device: torch.device) -> Teacher:
        """Move the model; its dtype stays."""
        self.model.to(device)
        return self

    def view(self, images: Tensor) -> Tensor:
        """The student's images as the teacher expects them: resized, and in its own normalisation.

        Args:
            images: [B, channels, height, width], normalised for the student.
        """
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True, align_corners=False)
        if self._renormalise is not None:
            mean_s, std_s, mean_t, std_t = (
                torch.tensor(v, device=images.device, dtype=images.dtype).view(1, -1, 1, 1)
                for norm in self._renormalise
                for v in (norm.mean, norm.std)
            )
            images = (images * std_s + mean_s - mean_t) / std_t
        return images

    def __call__(self, images: Tensor, taps: Taps) -> Outputs:
        """Its outputs for the student's images, float32, outside any graph."""
        own = nullcontext() if self.dtype is None else torch.autocast(images.device.type, enabled=False)
        with torch.inference_mode(), own:
            view = self.view(images)
            outputs = self._read(self.model, view if self.dtype is None else view.to(self.dtype), taps)
        return detach_copy(outputs)

    def fingerprint(self) -> str:
        """sha256 of the weights, their names, dtypes and shapes, the layers, and of how the images are prepared."""
        told = f"{self.name} {self.size} {self.normalisation} {self._renormalise} {self.dtype} {self.model}"
        return hashlib.sha256(f"{told} {digest_of(self.model.state_dict())}".encode()).hexdigest()


def load(name: str, path: str | None, *, in_chans: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A timm model with its weights: from `path`, or the pretrained ones. It keeps its own number of classes.

    Args:
        name: as `timm.create_model` takes it.
        path: .safetensors, or what torch.load(weights_only=True) reads; None for the pretrained weights.
        in_chans: channels of the images.
        device, dtype: where and as what to make it.

    Raises:
        ValueError: no such model, no pretrained weights, or weights of another model.
        FileNotFoundError: no such file.
    """
    where: dict[str, Any] = {"device": device, "dtype": dtype, "in_chans": in_chans}
    if path is None:
        try:
            return timm.create_model(name, pretrained=True, **where)
        except RuntimeError as error:
            raise ValueError(
                f"--kd-model-name: {name!r} cannot be made with pretrained weights ({error}); pass --kd-teacher-path"
            ) from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"--kd-teacher-path: there is no file {path}")
    try:
        state = load_state_dict(path, use_ema=False, weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"--kd-teacher-path: {path} is neither a safetensors file nor a torch file that loads without running "
            f"pickled code ({str(error).splitlines()[0]})"
        ) from error
    try:
        model = timm.create_model(name, **_classes_in(name, state), **where)
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"--kd-teacher-path: {path} does not hold weights of {name!r}: {' '.join(str(error).split())[:400]}"
        ) from error
    return model


def _classes_in(name: str, state: dict[str, Tensor]) -> dict[str, Any]:
    cfg: Any = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if cfg is not None:
        first = cfg.classifier[0] if isinstance(cfg.classifier, (tuple, list)) else cfg.classifier
    else:  # a model of the user's own: ask one without storage
        with torch.device("meta"):
            probe: Any = timm.create_model(name)
        classifier = probe.get_classifier()
        classifier = classifier[0] if isinstance(classifier, tuple) else classifier
        first = next((n for n, module in probe.named_modules() if module is classifier), None)
    weight = state.get(f"{first}.weight")
    return {} if weight is None else {"num_classes": len(weight)}


def choose_size(model: nn.Module, option: int | None) -> tuple[int, int] | None:
    """The size a teacher's images must have; None if it takes any.

    A model that says it takes one size (a ViT without dynamic_img_size) gets it; a CNN gets the student's images as
    they are, as in `timm.task`, unless the option names a size.
    """
    if option is not None:
        return (option, option)
    bare: Any = unwrap_model(model)
    patch_embed: Any = getattr(bare, "patch_embed", None)
    if getattr(patch_embed, "strict_img_size", False) and getattr(patch_embed, "img_size", None):
        return tuple(patch_embed.img_size)
    cfg: dict[str, Any] = getattr(bare, "pretrained_cfg", None) or {}
    if cfg.get("fixed_input_size") and not getattr(bare, "dynamic_img_size", False):
        return tuple(cfg["input_size"][-2:])
    return None
