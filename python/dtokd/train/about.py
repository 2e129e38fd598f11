"""What is known of a run before its first step: `about.json` of its directory, and the lines that tell it.

Data, the sizes of student and teachers, and the teachers' metrics on the validation split: a teacher that is wrong, or
was never trained, is the worst that can happen to a distillation, and costs one evaluation to find.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..objectives.cache import is_absent
from ..objectives.judged import judged
from .data import Data
from .engine import Engine, evaluate
from .randomness import kept

ABOUT = "about.json"
#: AP (COCO's) up to which a detector is as good as untrained.
NOTHING = 0.01
#: Options on which a teacher's metrics depend.
_JUDGED_WITH = (
    *("kd_model_name", "kd_teacher_path", "kd_model_kwargs", "kd_teacher_img_size", "kd_teacher_dtype", "amp"),
    *("data_dir", "dataset", "annotations", "val_split", "img_size", "input_size", "crop_pct", "interpolation"),
    *("amp_dtype", "max_size", "square"),
)


@dataclass(frozen=True)
class Known:
    """What only the one who made the task knows.

    Attributes:
        data: a line on each split.
        example: one image, as the student takes it, for counting operations.
    """

    data: Sequence[str]
    example: Any


@kept()
def find_out(engine: Engine, loaders: Data, known: Known, before: Mapping[str, Any]) -> dict[str, Any]:
    """What `about.json` holds; all ranks call it, as they share the evaluation of the teachers.

    Args:
        engine: of the run; its random numbers stay where they are.
        loaders: of the run; without a validation split no teacher is judged.
        known: what else is known.
        before: what the file holds already: teachers that it has, judged in the same way, are not judged again.

    Returns:
        "data", "judged_with", "student" and "teachers": each with "name", "parameters", "macs" (multiplications and
        additions for one image, or None), "told", and for a teacher that was judged "metrics" and, where it is as good
        as untrained, "warning". Of a teacher that is not loaded, as its outputs are stored, what was known before.
    """
    task = engine.task
    student = unwrap_model(task.get_eval_model())
    told: dict[str, Any] = {"data": list(known.data)}
    told["student"] = describe(engine.options.model, student, known.example)
    told["teachers"] = []
    told["judged_with"] = {name: str(getattr(engine.options, name, None)) for name in _JUDGED_WITH}
    known_already = before.get("teachers", ()) if before.get("judged_with") == told["judged_with"] else ()
    for number, (teacher, objectives) in enumerate(task.lessons):
        # by its place: teachers of one architecture differ in nothing but their weights
        held = known_already[number] if number < len(known_already) else None
        held = held if isinstance(held, dict) else {}
        if is_absent(teacher.model):
            there = held.get("name") == teacher.name
            stored = {"name": teacher.name, "told": f"{teacher.name}: not loaded, as all of its outputs are stored"}
            told["teachers"].append(held if there else stored)
            continue
        example = None if known.example is None else teacher.view(known.example)
        part = describe(teacher.name, teacher.model, example)
        if held.get("told") == part["told"] and "metrics" in held:
            part |= held
        elif engine.options.kd_eval_teacher and loaders.validation is not None:
            part |= _judge(engine, loaders.validation, teacher, objectives, student)
        told["teachers"].append(part)
    return told


def lines_of(about: Mapping[str, Any], metric: str) -> list[str]:
    """What a user is shown at the start."""
    lines = [f"student {about['student']['told']}"]
    for teacher in about["teachers"]:
        line = f"teacher {teacher['told']}"
        if metrics := teacher.get("metrics"):
            line += "; validation: " + ", ".join(
                f"{name} {_shown(metrics[name])}" for name in metrics if name == metric
            )
        lines.append(line)
        if warning := teacher.get("warning"):
            lines.append(f"warning: {warning}")
    return lines


def _shown(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"


def describe(name: str, model: nn.Module, example: Any) -> dict[str, Any]:
    """A model's size, in numbers and as a text."""
    parameters = sum(p.numel() for p in model.parameters())
    macs = count_macs(model, example)
    told = f"{name}: {_in_words(parameters)} parameters" + (f", {_in_words(macs)} MACs per image" if macs else "")
    return {"name": name, "parameters": parameters, "macs": macs, "told": told}


def _in_words(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


@torch.no_grad()
def count_macs(model: nn.Module, example: Any) -> int | None:
    """Multiplications with an addition of one forward pass in evaluation mode, counted by torch's `FlopCounterMode`.

    It counts convolutions, matrix products and attention; the rest is small beside them.

    Args:
        model: a timm model or a detector.
        example: one image for it; None gives None.
    """
    if example is None:
        return None
    training = model.training
    first = next(model.parameters(), None)
    if first is not None and isinstance(example, torch.Tensor):
        example = example.to(first.dtype)
    try:
        with FlopCounterMode(display=False) as counter:
            model.eval()(example)
        return int(counter.get_total_flops()) // 2
    except Exception:  # a layer that the counter, or the model on a blank image, does not take: nothing is lost
        return None
    finally:
        model.train(training)


def _judge(engine: Engine, loader: Any, teacher: Any, objectives: Sequence[Any], student: Any) -> dict[str, Any]:
    """A teacher's metrics on the validation split, where it has the student's classes; nothing else."""
    model = judged(teacher, student, engine.names)
    if model is None:
        return {}
    evaluator = engine.make_evaluator(loader)
    metrics = evaluate(
        model, loader, evaluator, engine.autocast, engine.options.channels_last, distributed=engine.world.joined
    )
    found = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    warning = _untrained(teacher.name, metrics, evaluator, any(o.teacher.logits for o in objectives))
    return {"metrics": found, **({"warning": warning} if warning else {})}


def _untrained(name: str, metrics: Mapping[str, float], evaluator: Any, imitated: bool) -> str:
    """Why a teacher looks as if it was never trained, or on other classes; "" if it does not."""
    harm = "the student would learn its mistakes" if imitated else "its features may be of no use"
    remedy = "look at --kd-teacher-path, and at the order of its classes"
    if "top1" in metrics:
        chance, count = evaluator.chance / 100, max(evaluator.num_samples, 1)
        # two standard deviations of as many guesses
        limit = 100 * (chance + 2 * math.sqrt(chance * (1 - chance) / count))
        if metrics["top1"] <= limit:  # not with NaN, of a data set that was not counted
            return (
                f"the teacher {name} is right in {metrics['top1']:.3g} % of the validation images; always naming the "
                f"most frequent class would be right in {100 * chance:.3g} %, so {harm}: {remedy}"
            )
    elif "ap" in metrics and metrics["ap"] < NOTHING:
        return f"the teacher {name} has an AP of {metrics['ap']:.3g} on the validation images, so {harm}: {remedy}"
    return ""
