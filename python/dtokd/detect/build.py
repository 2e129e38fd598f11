"""From the options to a task."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

import torch

from ..errors import UsageError
from ..objectives.base import Objective
from ..objectives.build import weights_of
from ..objectives.cache import CachedImages, kept_generators
from ..objectives.detection import Predictions, Tokens
from ..objectives.features import MultiScale
from ..objectives.taps import Outputs
from ..objectives.task import DistillationTask, Match
from ..objectives.teacher import Normalisation, Teacher
from .annotations import Annotations
from .cache import AbsentDetector, open_cache, prepare_cache
from .detectors.base import Detector
from .detectors.build import columns, make_teacher
from .evaluate import CocoEvaluator
from .matching import match_queries


def build(
    options: argparse.Namespace,
    student: Detector,
    train: Annotations,
    validation: Annotations | None,
    device: torch.device,
    images: CachedImages | None = None,
) -> DistillationTask:
    """The task that the options describe.

    Args:
        options: of `detect.options`.
        student: what learns.
        train, validation: annotations of the splits.
        device: of student and teacher.
        images: that the teacher will be shown, for --kd-cache-teacher.

    Raises:
        UsageError: options that contradict each other, or do not fit student, teacher or data.
    """
    check_queries(student, train, options.model)

    def evaluator() -> CocoEvaluator:
        assert validation is not None
        return CocoEvaluator(validation)

    if not options.kd_model_name:
        if options.kd_teacher_path or options.kd_share_queries or options.kd_cache_teacher:
            raise UsageError(
                "--kd-teacher-path, --kd-share-queries, --kd-cache-teacher: there is no teacher; pass --kd-model-name"
            )
        return DistillationTask(student, None, evaluator=evaluator, device=device)
    classes = list(train.categories.values())
    cache = None if images is None else open_cache(options, images)
    # the student may begin with the teacher's queries
    absent = cache is not None and cache.complete and not options.kd_share_queries
    if cache is not None and absent:
        teacher: Detector = AbsentDetector(cache.facts)
    else:
        # what comes after must not depend on whether a cache is complete
        with nullcontext() if cache is None else kept_generators(device):
            teacher = make_teacher(options, classes)
    if teacher.dense != student.dense:
        raise UsageError(
            f"--kd-model-name: {options.kd_model_name} and the student {options.model} are of two kinds, one has "
            "queries and one has not; take two of one kind"
        )
    known = teacher.columns if isinstance(teacher, AbsentDetector) else columns(teacher, classes)
    if options.kd_share_queries:
        share_queries(student, teacher)
    match = options.kd_match
    by_index = match == "index" or (match == "auto" and options.kd_share_queries)
    if by_index and not student.dense and student.queries != teacher.queries:
        raise UsageError(
            f"--kd-match index: the student has {student.queries} queries, the teacher {teacher.queries}; take "
            "--kd-match hungarian, or as many (--model-kwargs num_queries)"
        )
    kinds = options.kd_distill_type or (["feature", "prediction"] if student.dense else ["token"])
    if len(set(kinds)) != len(kinds):
        raise UsageError(f"--kd-distill-type: {' '.join(kinds)}; pass different ones")
    options.kd_distill_type = kinds  # for args.yaml and the report
    objectives = [_objective(kind, options, student, teacher, known) for kind in kinds]
    try:
        task_weight, weights = weights_of(options, [o.name for o in objectives])
    except ValueError as error:
        raise UsageError(str(error)) from error
    # only what belongs to a query needs a partner
    matched = not student.dense and not by_index and bool({"token", "prediction"} & set(kinds))
    frozen = Teacher(teacher, options.kd_model_name, Normalisation()).to(device)
    if cache is not None:
        prepare_cache(cache, options, frozen, objectives, known, device)
    return DistillationTask(
        student,
        None,
        [(frozen, objectives)],
        caches=[cache],
        match=_match(student, teacher, known) if matched else None,
        evaluator=evaluator,
        task_weight=task_weight,
        weights=weights,
        device=device,
    )


def _match(student: Detector, teacher: Detector, known: torch.Tensor | None) -> Match:
    """By the predictions of both: boxes, and the classes that both know."""

    def match(outputs: Outputs, taught: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
        assert outputs.boxes is not None
        assert taught.boxes is not None
        own = theirs = None
        if known is not None:
            own = student.probabilities(outputs)
            theirs = teacher.probabilities(taught)[..., known.to(own.device)]
        return match_queries((outputs.boxes, own), (taught.boxes, theirs))

    return match


def check_queries(student: Detector, annotations: Annotations, name: str) -> None:
    """Raises UsageError: an image has more objects than the student has queries."""
    if student.queries is not None and annotations.most > student.queries:
        raise UsageError(
            f"--model: {name} has {student.queries} queries, but an image of {annotations.path} has "
            f"{annotations.most} objects, and each query finds one; pass --model-kwargs num_queries={annotations.most} "
            "or more"
        )


def share_queries(student: Detector, teacher: Detector) -> None:
    """Start the student with the teacher's query embeddings and reference points: number i means the same for both.

    Raises:
        UsageError: not both have such queries, or of different number or width.
    """
    pairs: list[tuple[Any, Any]] = []
    for name in ("query_position_embeddings", "reference_points"):
        own, theirs = (getattr(getattr(getattr(d, "net", None), "model", None), name, None) for d in (student, teacher))
        if own is None or theirs is None or own.weight.shape != theirs.weight.shape:
            raise UsageError(
                "--kd-share-queries: student and teacher need learned queries of one number and width (num_queries, "
                "d_model), as the vidt detectors have them"
            )
        pairs.append((own, theirs))
    with torch.no_grad():
        for own, theirs in pairs:
            for p, q in zip(own.parameters(), theirs.parameters(), strict=True):
                p.copy_(q)


def _objective(
    kind: str, options: argparse.Namespace, student: Detector, teacher: Detector, known: torch.Tensor | None
) -> Objective:
    count = min(len(student.widths), len(teacher.widths))  # the coarsest levels
    stages = tuple(tuple(range(len(d.widths) - count, len(d.widths))) for d in (student, teacher))
    widths = student.widths[-count:], teacher.widths[-count:]
    norm, projector = options.kd_feature_norm, options.kd_projector
    if kind == "feature":
        return MultiScale(kind, projector, (stages[0], stages[1]), widths, norm, options.kd_feature_loss)
    if kind == "token":
        if student.token_width is None or teacher.token_width is None:
            raise UsageError(
                f"--kd-distill-type token: {options.model} has no detection tokens; take feature and prediction"
            )
        both = (student.token_width, teacher.token_width)
        distance, root = options.kd_feature_loss, options.kd_token_root
        return Tokens(kind, projector, (stages[0], stages[1]), widths, both, norm, distance, root)
    if known is None:
        raise UsageError(
            f"--kd-distill-type prediction: the teacher {options.kd_model_name} does not know all classes of the data; "
            "take token or feature"
        )
    if not student.sigmoid:
        raise UsageError(
            f"--kd-distill-type prediction: the student {options.model} has a softmax over its classes; take token"
        )
    return Predictions(kind, student.dense, known, softmax=not teacher.sigmoid)
