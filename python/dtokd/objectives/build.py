"""From the command line's options to a task."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.utils.model import unwrap_model
from torch import nn

from .. import identity
from ..errors import UsageError
from . import teacher as teachers
from .base import Objective
from .cache import TOO_LARGE, Absent, CachedImages, TeacherCache, TopClasses, Whole, kept_generators
from .features import Attention, MultiScale, Pooled
from .logits import Decoupled, Dist, Hinton, Standardised, Token
from .options import DISTILL_TYPES
from .relations import Contrastive, PseudoClass, Relational
from .review import Review
from .taps import choose_stages, pooled_width
from .task import DistillationTask, merge
from .teacher import Normalisation, Teacher, as_list

#: Types that read the teacher's logits: it must know the same classes.
OF_LOGITS = ("logit", "token", "dkd", "logit-std", "dist")
#: Types that read nothing else than these, and pooled features: all that a cache keeps.
WITHOUT_MAPS = (*OF_LOGITS, "feature", "rkd", "crd")
#: As path of a teacher: the weights that timm has for it.
PRETRAINED = "pretrained"
#: Options of the training loop under which an image has no single class.
MIXUP = ("mixup", "cutmix", "cutmix_minmax")
#: What is asked of a teacher when its task is made, to be noted in its cache.
_FACTS = ("num_classes", "num_features", "head_hidden_size", "pretrained_cfg")


def build(
    options: argparse.Namespace,
    student: nn.Module,
    criterion: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    names_of_classes: Sequence[str] | None = None,
    images: CachedImages | None = None,
) -> DistillationTask:
    """The task that `options` describe.

    With one of timm's distillation types and timm's own options its "loss" is that of timm's task.

    Args:
        options: with the arguments of `options.add_arguments`.
        student: a timm model, on `device`.
        criterion: the task loss, of (logits, target).
        device, dtype: of the teachers and of the task.
        names_of_classes: of the data, to be compared with a teacher's.
        images: that the teachers will be shown, for --kd-cache-teacher. A teacher whose outputs are all stored is not
            loaded.

    Returns:
        See `DistillationTask`.

    Raises:
        UsageError: options that contradict each other, or do not fit student or teacher.
    """
    named, types = named_teachers(options), as_list(options.kd_distill_type)
    if not named:
        return DistillationTask(student, criterion, device=device, dtype=dtype)
    _check(options, types, student)
    if "token" in types:
        unwrap_model(student).set_distilled_training(True)
    lessons: list[tuple[Teacher, list[Objective]]] = []
    caches: list[TeacherCache | None] = []
    taught = set[str]()
    for name, path, label in named:
        in_chans = getattr(unwrap_model(student), "in_chans", 3)
        path = None if path == PRETRAINED else path
        cache = None if images is None else _cache(options, images, len(lessons), name, path)
        if cache is not None and cache.complete:
            model: nn.Module = Absent(cache.facts)
        else:
            # what comes after must not depend on whether a cache is complete
            with nullcontext() if cache is None else kept_generators(device):
                model = load_teacher(options, name, path, in_chans=in_chans, device=device, dtype=dtype)
        objectives = {kind: _objective(kind, label, options, student, model) for kind in types}
        objectives = _teachable(objectives, student, model, name, names_of_classes, alone=len(named) == 1)
        features = not any(o.teacher.logits for o in objectives.values())
        trained = path is not None and os.path.isdir(path)
        sizes = [teachers.choose_size(model, options.kd_teacher_img_size, trained, alone) for alone in (False, True)]
        made = make_teacher(options, model, name, Normalisation.of(student), sizes[features])
        lessons.append((made, [*objectives.values()]))
        taught |= objectives.keys()
        caches.append(cache)
        if cache is not None:
            seen = {"features": features, "sizes": sizes}
            _check_size(cache, name, seen)
            cache.keep(
                _kept(options, model), merge([o.teacher for o in objectives.values()]), {**facts_of(model), **seen}
            )
    if untaught := [kind for kind in types if kind not in taught]:
        raise UsageError(
            f"--kd-distill-type {' '.join(untaught)}: no teacher has the student's {_classes(student)} classes; pass "
            "one that was trained on your classes, or take types that read features, such as feature and multiscale"
        )
    task_weight, weights = weights_of(options, [o.name for _, several in lessons for o in several])
    return DistillationTask(
        student, criterion, lessons, caches=caches, task_weight=task_weight, weights=weights, device=device, dtype=dtype
    )


def _cache(options: argparse.Namespace, images: CachedImages, number: int, name: str, path: str | None) -> TeacherCache:
    """That of one teacher, perhaps without a file yet."""
    types = as_list(options.kd_distill_type)
    told = {
        "--kd-model-name": name,
        "--kd-model-kwargs": getattr(options, "kd_model_kwargs", None) or {},
        "weights (sha256)": "pretrained" if path is None else identity.of_path(Path(path)),
        "--kd-teacher-dtype": options.kd_teacher_dtype,
        "--kd-teacher-img-size": options.kd_teacher_img_size,
        "autocast": options.amp_dtype if getattr(options, "amp", False) else None,
        **cache_told(options, ("--kd-temperature",) if set(types) & set(OF_LOGITS) else ()),
    }
    return TeacherCache(folder_of(options, images, number, name), images, told)


def cache_told(options: argparse.Namespace, more: Sequence[str] = ()) -> dict[str, Any]:
    """What a cache's rows depend on, by the names that messages use.

    Args:
        options: of `options.add_cache`.
        more: options that count where not all is stored.
    """
    told = {"--kd-cache-dtype": options.kd_cache_dtype, "--kd-cache-topk": options.kd_cache_topk}
    partly = more if options.kd_cache_topk else ()
    return told | {name: getattr(options, name[2:].replace("-", "_")) for name in partly}


def folder_of(options: argparse.Namespace, images: CachedImages, number: int, name: str) -> Path:
    """Where a teacher's cache is: runs of other seeds, and their other images, have folders of their own."""
    short = re.sub(r"[^\w.-]+", "_", name.strip("/").rsplit("/", 1)[-1])
    return Path(options.kd_cache_teacher) / f"seed-{images.seed}" / f"{number + 1}-{short}"


def _kept(options: argparse.Namespace, model: nn.Module) -> Whole:
    dtype, k = getattr(torch, options.kd_cache_dtype), options.kd_cache_topk
    classes = getattr(unwrap_model(model), "num_classes", 0)
    return TopClasses(dtype, k, classes, options.kd_temperature) if k and k < classes else Whole(dtype)


def _check_size(cache: TeacherCache, name: str, seen: dict[str, Any]) -> None:
    """Refuse stored outputs of images of another size, which depends on what is read of the teacher.

    Args:
        cache: with the facts of the run that made it, if there was one.
        name: of the teacher.
        seen: whether this run reads features alone, and its sizes without and with that.

    Raises:
        UsageError: the sizes differ; the text names the option that sets them.
    """
    if "sizes" not in cache.facts:
        return
    before, now = (cache.facts["sizes"][flag] for flag in (cache.facts["features"], seen["features"]))
    if before != now:
        told = ["the student's" if size is None else f"{size[0]} x {size[1]}" for size in (before, now)]
        raise UsageError(
            f"--kd-cache-teacher: {cache.folder} holds outputs of {name!r} for images of {told[0]} size, but this "
            f"run needs those for {told[1]}; pass the same --kd-teacher-img-size to both runs, or another folder"
        )


def facts_of(model: nn.Module) -> dict[str, Any]:
    """Of a teacher, what `build` asks of it."""
    bare = unwrap_model(model)
    facts = {name: getattr(bare, name) for name in _FACTS if hasattr(bare, name)}
    known = ("mean", "std", "label_names", "input_size")
    cfg = facts.get("pretrained_cfg") or {}
    return {**facts, "pretrained_cfg": {name: cfg[name] for name in known if name in cfg}}


def _check(options: argparse.Namespace, types: Sequence[str], student: nn.Module) -> None:
    unknown = [t for t in types if t not in DISTILL_TYPES]
    if unknown or len(set(types)) != len(types) or not types:
        raise UsageError(f"--kd-distill-type: got {types}; pass different ones of {', '.join(DISTILL_TYPES)}")
    if options.kd_cache_teacher and not set(types) <= set(WITHOUT_MAPS):
        raise UsageError(TOO_LARGE)
    if "dkd" in types and (mixed := [name for name in MIXUP if getattr(options, name, 0)]):
        raise UsageError(
            f"--kd-distill-type dkd: with --{mixed[0].replace('_', '-')} an image has no target class; leave one out"
        )
    bare = unwrap_model(student)
    if "token" in types and not hasattr(bare, "set_distilled_training"):
        raise UsageError(
            f"--kd-distill-type token: the student {type(bare).__name__} has no distillation head; pass a distilled "
            "model such as deit_tiny_distilled_patch16_224, or --kd-distill-type logit"
        )


def load_teacher(options: argparse.Namespace, name: str, path: str | None, **where: Any) -> nn.Module:
    """`teacher.load` with the options' arguments; the path may be the word "pretrained"."""
    arguments = getattr(options, "kd_model_kwargs", None)
    return teachers.load(name, None if path == PRETRAINED else path, arguments=arguments, **where)


def make_teacher(
    options: argparse.Namespace, model: nn.Module, name: str, student: Normalisation, size: tuple[int, int] | None
) -> Teacher:
    """A timm model as the options want to read it."""
    return Teacher(
        model,
        name,
        student,
        dtype=getattr(torch, options.kd_teacher_dtype) if options.kd_teacher_dtype else None,
        compile=options.kd_teacher_compile,
        size=size,
        multiple=teachers.patch_of(model),
    )


def _classes(model: nn.Module) -> int | None:
    return getattr(unwrap_model(model), "num_classes", None)


def _teachable(
    objectives: dict[str, Objective],
    student: nn.Module,
    model: nn.Module,
    name: str,
    names: Sequence[str] | None,
    alone: bool,
) -> dict[str, Objective]:
    """By its type, each objective that the teacher can serve: its logits only where it has the student's classes.

    Raises:
        UsageError: it can serve none, or a single teacher not all; or its classes have other names than the data's.
    """
    reading = [kind for kind, o in objectives.items() if o.teacher.logits]
    own, theirs = _classes(student), _classes(model)
    if reading and own != theirs:
        if alone or len(reading) == len(objectives):
            raise UsageError(
                f"--kd-distill-type {' '.join(reading)}: the student has {own} classes, the teacher {name!r} {theirs}; "
                "pass --num-classes of the teacher, a teacher trained on your classes, or types that read features: "
                "--kd-distill-type feature or multiscale"
            )
        return {kind: o for kind, o in objectives.items() if kind not in reading}
    known = teachers.names_of(model)
    if reading and names is not None and known is not None and known != list(names):
        i = next(i for i, (a, b) in enumerate(zip(known, names, strict=True)) if a != b)
        raise UsageError(
            f"--kd-distill-type {' '.join(reading)}: class {i} is {names[i]!r} in the data, but {known[i]!r} for the "
            f"teacher {name!r}; take a teacher of these classes, --class-map, or --kd-distill-type feature"
        )
    return objectives


def named_teachers(options: argparse.Namespace, more: str = "") -> list[tuple[str, str | None, str]]:
    """For each teacher its name, the path of its weights, and what is added to the names of its objectives.

    Nothing is added for one teacher; for several it is each one's name, with a number where it occurs twice.

    Args:
        options: of a command that trains.
        more: an option besides those of all commands that needs a teacher.

    Raises:
        UsageError: there are not as many weights as teachers, or an option needs a teacher and there is none.
    """
    names, paths = as_list(options.kd_model_name), as_list(options.kd_teacher_path)
    needing = [option for option in ("--kd-teacher-path", more, "--kd-cache-teacher") if option]
    if not names and any(getattr(options, option[2:].replace("-", "_")) for option in needing):
        runs = "" if more else ", or run directories"
        raise UsageError(f"{', '.join(needing)}: there is no teacher; pass --kd-model-name{runs}")
    if paths and len(paths) != len(names):
        raise UsageError(
            f"--kd-teacher-path: got {len(paths)} files for {len(names)} teachers; pass one each, or none; the word "
            "pretrained stands for the weights that timm has"
        )
    short = [re.sub(r"\W+", "_", name.rsplit("/", 1)[-1].split(".")[0]) for name in names]
    labels = [f"_{s}" if short.count(s) == 1 else f"_{s}_{short[:i].count(s) + 1}" for i, s in enumerate(short)]
    return list(zip(names, paths or [None] * len(names), labels if len(names) > 1 else [""] * len(names), strict=True))


def _objective(kind: str, label: str, options: argparse.Namespace, student: nn.Module, teacher: nn.Module) -> Objective:
    name = DISTILL_TYPES[kind] + label
    if kind == "logit":
        return Hinton(name, options.kd_temperature)
    if kind == "logit-std":
        return Standardised(name, options.kd_temperature)
    if kind == "dist":
        return Dist(name, options.kd_temperature)
    if kind == "token":
        return Token(name, options.kd_token_distill_type, options.kd_temperature)
    if kind == "dkd":
        return Decoupled(name, options.kd_temperature, options.kd_dkd_alpha, options.kd_dkd_beta)
    norm, distance = options.kd_feature_norm, options.kd_feature_loss
    pool = options.kd_feature_pool
    if kind == "rkd":
        return Relational(name, pool)
    if kind in ("feature", "crd", "pseudo-class"):
        widths = (
            options.kd_student_feature_dim or pooled_width(student, pool),
            options.kd_teacher_feature_dim or pooled_width(teacher, pool),
        )
    if kind == "feature":
        return Pooled(name, options.kd_projector, widths, pool, norm, distance)
    if kind == "crd":
        return Contrastive(name, options.kd_projector, widths, pool, options.kd_contrast_temperature)
    if kind == "pseudo-class":
        last, width = choose_stages(student, 1, None, "student")
        their_last, their_width = choose_stages(teacher, 1, None, "teacher")
        sizes = options.kd_queue_size, options.kd_contrast_temperature
        maps = (*width, *their_width), (*last, *their_last)
        return PseudoClass(name, options.kd_projector, widths, *maps, pool, *sizes)
    own, own_widths = choose_stages(student, options.kd_stages, options.kd_student_stages, "student")
    theirs, their_widths = choose_stages(teacher, options.kd_stages, options.kd_teacher_stages, "teacher")
    if len(own) != len(theirs):
        raise UsageError(
            f"--kd-student-stages, --kd-teacher-stages: {len(own)} stages against {len(theirs)}; pass as many of each"
        )
    stages, widths_of = (own, theirs), (own_widths, their_widths)
    if kind == "attention":
        return Attention(name, stages)
    if kind == "review":
        return Review(name, stages, widths_of, options.kd_review_width)
    return MultiScale(name, options.kd_projector, stages, widths_of, norm, distance)


def weights_of(options: argparse.Namespace, names: Sequence[str]) -> tuple[float, dict[str, float]]:
    """The weights of the task and of each objective in the sum, as timm's train.py reads --task-loss-weight.

    Raises:
        UsageError: weights for another number of objectives, or the task's weight leaves less than 0 for them.
    """
    task, distill = options.task_loss_weight, as_list(options.distill_loss_weight)
    if not distill:
        if task is not None and task > 1:
            raise UsageError(
                f"--task-loss-weight: {task:g} alone leaves {1 - task:g} for distillation, which would train "
                "the student away from the teacher; pass --distill-loss-weight too"
            )
        shared = 1.0 if task is None else (1.0 - task) / len(names)
        return (1.0 if task is None else task), dict.fromkeys(names, shared)
    if len(distill) not in (1, len(names)):
        raise UsageError(
            f"--distill-loss-weight: got {len(distill)} for the objectives {', '.join(names)}; pass one, or one each"
        )
    each = distill if len(distill) == len(names) else distill * len(names)
    return (1.0 if task is None else task), dict(zip(names, each, strict=True))
