"""A frozen teacher: its weights, its own view of the student's images, its forward pass."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from ..card import read_card
from ..errors import UsageError, reason_of
from ..files import read_weights
from .taps import NoGrid, Outputs, Taps, read


@dataclass(frozen=True)
class Normalisation:
    """How images were normalised: (pixel in [0, 1] - mean) / std per channel."""

    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    @classmethod
    def of(cls, model: nn.Module) -> Normalisation:
        """That of a timm model's `pretrained_cfg`; ImageNet's for others, as in `timm.task`."""
        cfg = _cfg_of(model)
        mean, std = cfg.get("mean", IMAGENET_DEFAULT_MEAN), cfg.get("std", IMAGENET_DEFAULT_STD)
        return cls(tuple(mean), tuple(std))

    def of_channels(self, count: int) -> Normalisation:
        """For images of so many channels: as in timm's loaders the average, where it is of another number of them."""
        if len(self.mean) == count:
            return self
        mean, std = ((math.fsum(values) / len(values),) * count for values in (self.mean, self.std))
        return Normalisation(mean, std)


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
        multiple: or each side to the nearest multiple of it, where it is none: that of a patch.
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
        multiple: int = 1,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name, self.dtype, self.size, self.multiple = name, dtype, size, multiple
        if dtype is not None:
            self.model.to(dtype)
        self.normalisation = Normalisation.of(model).of_channels(len(student.mean))
        self._renormalise = None if self.normalisation == student else (student, self.normalisation)
        self._read: Callable[[nn.Module, Tensor, Taps], Outputs] = torch.compile(read) if compile else read

    def to(self, device: torch.device) -> Teacher:
        """Move the model; its dtype stays."""
        self.model.to(device)
        return self

    def view(self, images: Any) -> Any:
        """The student's images as the teacher expects them: resized, and in its own normalisation.

        Args:
            images: [B, channels, height, width], normalised for the student. A detector's are no tensor: they are not
                normalised yet, and stay as they are for a teacher that is a detector itself.
        """
        if not isinstance(images, Tensor):
            if hasattr(self.model, "observe"):
                return images
            images = images.filled(self.normalisation.mean)
        height, width = images.shape[-2:]
        size = self.size or (_nearest(height, self.multiple), _nearest(width, self.multiple))
        if size != (height, width):
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        if self._renormalise is not None:
            mean_s, std_s, mean_t, std_t = (
                torch.tensor(v, device=images.device, dtype=images.dtype).view(1, -1, 1, 1)
                for norm in self._renormalise
                for v in (norm.mean, norm.std)
            )
            images = (images * std_s + mean_s - mean_t) / std_t
        return images

    def __call__(self, images: Any, taps: Taps) -> Outputs:
        """Its outputs for the student's images, float32, outside any graph."""
        with torch.inference_mode():
            view = self.view(images)
        own = nullcontext() if self.dtype is None else torch.autocast(view.device.type, enabled=False)
        with torch.inference_mode(), own:
            outputs = self._read(self.model, view if self.dtype is None else view.to(self.dtype), taps)
        # ordinary tensors: one of inference mode cannot be saved for a backward pass
        return outputs.each(lambda x: x.detach().to(torch.float32, copy=True))

    def try_on(self, images: Any, taps: Taps) -> Outputs:
        """As a call, for images that show before training what does not fit.

        Raises:
            UsageError: the teacher does not take images of this size, or has no maps.
        """
        try:
            return self(images, taps)
        except NoGrid:
            raise
        except Exception as error:  # what timm and its models raise is of every kind
            size = tuple(getattr(images, "pixels", images).shape[1:])
            raise UsageError(
                f"--kd-model-name: teacher {self.name!r} does not take the student's images of {size}: "
                f"{reason_of(error)}; choose --kd-teacher-img-size, --img-size, or another teacher"
            ) from error


def _cfg_of(model: nn.Module) -> dict[str, Any]:
    """Of a timm model, what it was trained with; nothing of others."""
    return getattr(unwrap_model(model), "pretrained_cfg", None) or {}


def names_of(model: nn.Module) -> list[str] | None:
    """The classes of a model of a run directory, in their order; None where they have no names."""
    names = _cfg_of(model).get("label_names")
    return names if isinstance(names, list) else None


def _nearest(side: int, multiple: int) -> int:
    return max(round(side / multiple), 1) * multiple


def resolve_teachers(options: argparse.Namespace) -> None:
    """Set `--kd-model-name` where `--kd-teacher-path` names nothing but run directories, which hold it.

    Raises:
        UsageError: one is no run directory of `dtokd train`.
    """
    paths = as_list(options.kd_teacher_path)
    if paths and not options.kd_model_name and all(os.path.isdir(path) for path in paths):
        options.kd_model_name = [read_card(path, "--kd-teacher-path")["architecture"] for path in paths]


def as_list(value: Any) -> list[Any]:
    """What nargs="+" gives, also where a config file gave one value."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def load(
    name: str,
    path: str | None,
    *,
    in_chans: int,
    device: torch.device,
    dtype: torch.dtype,
    arguments: dict[str, Any] | None = None,
) -> nn.Module:
    """A timm model with its weights: from `path`, or the pretrained ones. It keeps its own number of classes.

    Args:
        name: as `timm.create_model` takes it.
        path: .safetensors, or what torch.load(weights_only=True) reads; a run directory of `dtokd train`, whose model
            has the arguments and the preprocessing that it was trained with; None for the pretrained weights.
        in_chans: channels of the images.
        device, dtype: where and as what to make it.
        arguments: more of `timm.create_model`.

    Raises:
        UsageError: no such model, no pretrained weights, no such file, or weights of another model.
    """
    where: dict[str, Any] = {"device": device, "dtype": dtype, **(arguments or {})}
    told = f"--kd-model-name {name}" + (f", --kd-model-kwargs {arguments}" if arguments else "")
    if path is None:
        try:
            return timm.create_model(name, pretrained=True, in_chans=in_chans, **where)
        except Exception as error:  # what timm and its models raise is of every kind
            raise UsageError(
                f"{told}: cannot be made with pretrained weights ({reason_of(error)}); pass --kd-teacher-path"
            ) from error
    if os.path.isdir(path):
        card = read_card(path, "--kd-teacher-path")
        if name != card["architecture"]:
            raise UsageError(
                f"--kd-model-name: {name}, but {path} is a run of {card['architecture']}; leave the name out"
            )
        made, file = f"local-dir:{path}", os.path.join(path, "student.safetensors")
    else:
        made, file = name, path
    state = read_weights(file, "--kd-teacher-path")
    try:
        more = {} if made != name else {"in_chans": in_chans, **_classes_in(name, state)}
        model: Any = timm.create_model(made, **{**more, **where})
    except Exception as error:
        raise UsageError(f"{told}: {reason_of(error)}") from error
    if getattr(model, "in_chans", in_chans) != in_chans:
        raise UsageError(f"--kd-teacher-path: {path} takes images of {model.in_chans} channels, not {in_chans}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f"--kd-teacher-path: {path} does not hold weights of {name!r}: {reason_of(error)}") from error
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
    if first is None:
        return {}
    weight = state.get(f"{first}.weight")
    return {"num_classes": 0 if weight is None else len(weight)}


def choose_size(
    model: nn.Module, option: int | str | None, trained: bool = False, features: bool = False
) -> tuple[int, int] | None:
    """The size a teacher's images must have; None if it takes the student's.

    A model that takes one size only (a ViT without dynamic_img_size) gets it. One that takes any gets the student's
    images as they are, as in `timm.task`, unless the option names a size, or it is a transformer that is read for its
    features: these are best at the size that it was trained with.

    Args:
        model: of `load`.
        option: `--kd-teacher-img-size`: a number, "own", "student" or None.
        trained: whether its `pretrained_cfg` has the size that it was trained with: of a run directory.
        features: whether it is read for its features alone, and prefers its own size.

    Raises:
        UsageError: "own", but the model does not name its size.
    """
    if isinstance(option, int):
        return (option, option)
    bare: Any = unwrap_model(model)
    cfg = _cfg_of(model)
    own = tuple(cfg["input_size"][-2:]) if cfg.get("input_size") else None
    patch_embed: Any = getattr(bare, "patch_embed", None)
    if getattr(patch_embed, "strict_img_size", False) and getattr(patch_embed, "img_size", None):
        return tuple(patch_embed.img_size)
    if option == "own" and own is None:
        raise UsageError(
            f"--kd-teacher-img-size own: {type(bare).__name__} does not name the size of its images; pass a number"
        )
    if option == "own" or (trained and option is None):
        return own
    if cfg.get("fixed_input_size") and (features or not getattr(bare, "dynamic_img_size", False)):
        return None if option == "student" else own
    return None


def patch_of(model: nn.Module) -> int:
    """What the sides of a model's images must be multiples of: a transformer's patch; 1 for others."""
    info: Any = getattr(unwrap_model(model), "feature_info", None)
    stages: list[dict[str, Any]] = list(getattr(info, "info", info) or [])
    strides = {stage.get("reduction") for stage in stages}
    stride = strides.pop() if len(strides) == 1 else 1
    return stride if isinstance(stride, int) else 1
