"""The teacher: made by timm, frozen, from a file or from timm's pretrained weights."""

from __future__ import annotations

import argparse

import timm
import torch
from timm.models import load_state_dict
from torch import nn

from ..errors import UsageError


def load_teacher(
    options: argparse.Namespace, student: nn.Module, *, device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    """The teacher that the options name, in eval mode and without gradients.

    Args:
        options: kd_model_name, kd_teacher_path.
        student: what the teacher has to agree with: classes and channels.
        device, dtype: of the teacher.

    Raises:
        UsageError: no such model or file, weights of another model or for another number of classes.
    """
    name, path = options.kd_model_name, options.kd_teacher_path
    if not timm.is_model(name.split("/")[-1].split(":")[-1]) and not name.startswith(("hf-hub:", "hf_hub:")):
        raise UsageError(f"--kd-model-name: timm has no model {name!r}; timm.list_models('*part*') finds names")
    classes = student.num_classes
    if path is None:
        try:
            teacher = timm.create_model(name, pretrained=True, num_classes=classes, in_chans=student.in_chans)
        except Exception as error:
            raise UsageError(
                f"--kd-model-name: the pretrained weights of {name!r} could not be loaded ({error}); give a file with "
                "--kd-teacher-path"
            ) from error
        pretrained = teacher.pretrained_cfg.get("num_classes")
        if pretrained is not None and pretrained != classes:
            raise UsageError(
                f"--kd-model-name: the pretrained {name!r} knows {pretrained} classes, the student {classes}; its head "
                "would be random: give a teacher trained on these classes with --kd-teacher-path"
            )
    else:
        teacher = timm.create_model(name, num_classes=classes, in_chans=student.in_chans)
        _load(teacher, name, path)
    teacher = teacher.to(device=device, dtype=dtype)
    return teacher.eval().requires_grad_(False)


def _load(teacher: nn.Module, name: str, path: object) -> None:
    try:
        weights = load_state_dict(str(path), weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"--kd-teacher-path: there is no file {path}") from None
    except Exception as error:
        raise UsageError(f"--kd-teacher-path: {path} is no readable checkpoint: {error}") from error
    own = teacher.state_dict()
    differing = [key for key in own if key in weights and weights[key].shape != own[key].shape]
    absent = [key for key in own if key not in weights]
    more = [key for key in weights if key not in own]
    if not (differing or absent or more):
        teacher.load_state_dict(weights)
        return
    if differing and not absent and not more and len(differing) <= 4:
        key = differing[-1]
        raise UsageError(
            f"--kd-teacher-path: in {path} {key} has the shape {tuple(weights[key].shape)}, expected "
            f"{tuple(own[key].shape)}: the teacher was trained for another number of classes or another input; train "
            "it on the student's classes"
        )
    what = [
        f"{len(keys)} {kind}, such as {keys[0]}"
        for kind, keys in (("missing", absent), ("not known", more), ("of another shape", differing))
        if keys
    ]
    raise UsageError(f"--kd-teacher-path: {path} does not hold the weights of {name!r}: {'; '.join(what)}")
