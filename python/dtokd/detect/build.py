"""From the options to a task."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import timm
import torch

from ..errors import UsageError
from ..objectives.base import Objective
from ..objectives.build import load_teacher, named_teachers, weights_of
from ..objectives.build import make_teacher as reader
from ..objectives.cache import TOO_LARGE, CachedImages, TeacherCache, kept_generators
from ..objectives.detection import Predictions, Tokens
from ..objectives.features import MultiScale
from ..objectives.taps import Outputs, Taps, choose_stages
from ..objectives.task import DistillationTask, Match
from ..objectives.teacher import Normalisation, Teacher, as_list, choose_size
from ..train.options import flag
from ..train.world import World
from .annotations import Annotations
from .batch import Images, padded
from .cache import AbsentDetector, open_cache, prepare_cache
from .detectors.base import Detector
from .detectors.build import DENSE, check_directory, columns, is_detector, make_teacher
from .evaluate import CocoEvaluator
from .matching import match_queries

#: Types that need nothing of a teacher but maps.
OF_BACKBONES = ("feature",)
#: A teacher, its objectives, and perhaps the cache of its outputs.
Lesson = tuple[Teacher, list[Objective], TeacherCache | None]


def build(
    options: argparse.Namespace,
    student: Detector,
    train: Annotations,
    validation: Annotations | None,
    device: torch.device,
    images: CachedImages | None = None,
    world: World | None = None,
) -> DistillationTask:
    """The task that the options describe.

    Args:
        options: of `detect.options`.
        student: what learns.
        train, validation: annotations of the splits.
        device: of student and teacher.
        images: that the teacher will be shown, for --kd-cache-teacher.
        world: the processes that train together; default: this one alone.

    Raises:
        UsageError: options that contradict each other, or do not fit student, teacher or data.
    """
    check_queries(student, train, options.model)

    def evaluator() -> CocoEvaluator:
        assert validation is not None
        return CocoEvaluator(validation, world)

    named = named_teachers(options, "--kd-share-queries")
    options.kd_distill_type = _types(
        options, student.dense, [name for name, _, _ in named]
    )  # for args.yaml and the report
    if not named:
        return DistillationTask(student, None, evaluator=evaluator, device=device)
    _check_reading(options, [name for name, _, _ in named])
    if len(named) == 1:  # of several teachers the arguments may be another one's
        check_directory(named[0][0], {"--kd-model-kwargs": options.kd_model_kwargs})
    match: Match | None = None
    lessons: list[Lesson] = []
    blank = blank_images(options, device)
    for name, path, label in named:
        if is_detector(name):
            lesson, match = _detector(options, student, list(train.categories.values()), name, path, device, images)
        else:
            lesson = _features(options, student, name, path, blank, images)
        for o in lesson[1]:
            o.name += label
        lessons.append(lesson)
    task_weight, weights = weights_of(options, [o.name for _, several, _ in lessons for o in several])
    task = DistillationTask(
        student,
        None,
        [(teacher, objectives) for teacher, objectives, _ in lessons],
        caches=[cache for _, _, cache in lessons],
        match=match,
        evaluator=evaluator,
        task_weight=task_weight,
        weights=weights,
        device=device,
    )
    task.check(blank)
    return task


def _check_reading(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises UsageError: there are options of timm's models as teachers, but no such teacher."""
    read_with = ("kd_teacher_img_size", "kd_teacher_dtype", "kd_teacher_compile")
    given = [flag(name) for name in read_with if getattr(options, name)]
    if given and all(is_detector(name) for name in names):
        raise UsageError(
            f"{', '.join(given)}: for timm's models as teachers, but {names[0]} is a detector; leave it out"
        )


def objectives_of(options: argparse.Namespace) -> int:
    """How many distillation objectives these options make.

    Raises:
        UsageError: their types do not fit the teachers.
    """
    names = as_list(options.kd_model_name)
    kinds = _types(options, options.model.partition(":")[0] in DENSE, names)
    return sum(len(_kinds(kinds, name)) for name in names)


def _types(options: argparse.Namespace, dense: bool, names: Sequence[str]) -> list[str] | None:
    """The types that are asked for, or the default ones.

    Raises:
        UsageError: one is there twice, or no teacher has it; or there are several detectors.
    """
    detectors = [name for name in names if is_detector(name)]
    if len(detectors) > 1:
        raise UsageError(
            f"--kd-model-name: {' and '.join(detectors)} are detectors; pass one at most, and any number of timm's "
            "models"
        )
    if options.kd_distill_type is None:
        if not names:
            return None
        own = [] if not detectors else ["feature", "prediction"] if dense else ["token"]
        more = ["feature"] if len(names) > len(detectors) and "feature" not in own else []
        return own + more
    kinds = list(options.kd_distill_type)
    if len(set(kinds)) != len(kinds):
        raise UsageError(f"--kd-distill-type: {' '.join(kinds)}; pass different ones")
    if names and not detectors and (wrong := [kind for kind in kinds if kind not in OF_BACKBONES]):
        raise UsageError(
            f"--kd-distill-type {' '.join(wrong)}: {' and '.join(names)} is no detector, so it has features alone; "
            "take --kd-distill-type feature, or a detector as teacher"
        )
    return kinds


def _kinds(kinds: Sequence[str] | None, name: str) -> list[str]:
    """Those of the types that a teacher can serve.

    Raises:
        UsageError: none.
    """
    served = [kind for kind in kinds or () if is_detector(name) or kind in OF_BACKBONES]
    if not served:
        raise UsageError(
            f"--kd-distill-type {' '.join(kinds or ())}: {name} is no detector, so it has features alone; add feature"
        )
    return served


def blank_images(options: argparse.Namespace, device: torch.device) -> Images:
    """Two images as training may see them, the second padded: what does not fit shows before training."""
    side = padded(options.img_size)
    pixels = torch.zeros(2, 3, side, side, device=device)
    mask = torch.ones(2, side, side, dtype=torch.bool, device=device)
    mask[1, :, side // 2 :] = False
    return Images(pixels, mask, [(side, side), (side, side // 2)])


def _detector(
    options: argparse.Namespace,
    student: Detector,
    classes: list[str],
    name: str,
    path: str | None,
    device: torch.device,
    images: CachedImages | None,
) -> tuple[Lesson, Match | None]:
    """A detector as teacher, and what pairs its queries with the student's.

    Raises:
        UsageError: it is of another kind than the student, or does not fit it.
    """
    kinds = _kinds(options.kd_distill_type, name)
    cache = None if images is None else open_cache(options, images, name, path)
    # the student may begin with the teacher's queries
    absent = cache is not None and cache.complete and not options.kd_share_queries
    if cache is not None and absent:
        teacher: Detector = AbsentDetector(cache.facts)
    else:
        # what comes after must not depend on whether a cache is complete
        with nullcontext() if cache is None else kept_generators(device):
            teacher = make_teacher(options, name, path, classes)
    if teacher.dense != student.dense:
        raise UsageError(
            f"--kd-model-name: {name} and the student {options.model} are of two kinds, one has queries and one has "
            "not; take two of one kind"
        )
    known = teacher.columns if isinstance(teacher, AbsentDetector) else columns(teacher, classes)
    if options.kd_share_queries:
        share_queries(student, teacher)
    by_index = options.kd_match == "index" or (options.kd_match == "auto" and options.kd_share_queries)
    if by_index and not student.dense and student.queries != teacher.queries:
        raise UsageError(
            f"--kd-match index: the student has {student.queries} queries, the teacher {teacher.queries}; take "
            "--kd-match hungarian, or as many (--model-kwargs num_queries)"
        )
    objectives = [_objective(kind, options, student, teacher, name, known) for kind in kinds]
    # only what belongs to a query needs a partner
    matched = not student.dense and not by_index and bool({"token", "prediction"} & set(kinds))
    frozen = Teacher(teacher, name, Normalisation()).to(device)
    if cache is not None:
        prepare_cache(cache, options, frozen, objectives, known, device)
    return (frozen, objectives, cache), _match(student, teacher, known) if matched else None


@torch.no_grad()
def _features(
    options: argparse.Namespace,
    student: Detector,
    name: str,
    path: str | None,
    blank: Images,
    images: CachedImages | None,
) -> Lesson:
    """A timm model as teacher, and the objective between its maps and the student's levels.

    Raises:
        UsageError: there is no such model, or its maps cannot be compared with the student's.
    """
    if not timm.is_model(name.rsplit("/", 1)[-1]) and ":" not in name:
        raise UsageError(
            f"--kd-model-name: {name!r} is neither a detector (as --model takes them) nor one of timm's models; "
            "timm.list_models('*part*') finds names"
        )
    _kinds(options.kd_distill_type, name)
    if images is not None:
        raise UsageError(TOO_LARGE)
    if options.kd_share_queries:
        raise UsageError(f"--kd-share-queries: {name} is no detector and has none; leave it out")
    model = load_teacher(options, name, path, in_chans=3, device=blank.pixels.device, dtype=torch.float32)
    their_stages, their_widths = choose_stages(model, None, as_list(options.kd_teacher_stages) or None, "teacher")
    # pixels in [0, 1], not normalised yet
    pixels = Normalisation((0.0,) * 3, (1.0,) * 3)
    teacher = reader(options, model, name, pixels, choose_size(model, options.kd_teacher_img_size))
    found = teacher.try_on(blank, Taps(stages=their_stages)).maps
    was = student.training
    grids = [m.shape[-2:] for m in student.eval().observe(blank).maps]
    student.train(was)
    pairs = pair_levels(options, grids, [m.shape[-2:] for m in found])
    own = tuple(level for level, _ in pairs)
    theirs = tuple(their_stages[k] for _, k in pairs)
    widths = [student.widths[level] for level in own], [their_widths[k] for _, k in pairs]
    norm, distance = options.kd_feature_norm, options.kd_feature_loss
    objective = MultiScale("feature", options.kd_projector, (own, theirs), widths, norm, distance)
    return teacher, [objective], None


def pair_levels(
    options: argparse.Namespace, own: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]
) -> list[tuple[int, int]]:
    """Which of the student's levels is compared with which of the teacher's maps.

    Both are averaged to the coarser grid. So a map goes to the coarsest level that is as fine at least, where the
    student has not to tell more than the level holds; of several maps for one level the deepest is taken, such as the
    last block of a transformer, whose maps all have one grid.

    Args:
        options: `--kd-student-stages` and `--kd-teacher-stages`, which pair in their order where both are given.
        own: height and width of the student's levels, fine to coarse.
        theirs: of the teacher's maps, shallow to deep.

    Returns:
        Positions in both, rising.

    Raises:
        UsageError: an index that does not exist, or another number of levels than of maps.
    """
    given = as_list(options.kd_student_stages)
    if any(not 0 <= level < len(own) for level in given) or given != sorted(set(given)):
        raise UsageError(
            f"--kd-student-stages: got {given}, but the student has levels 0 to {len(own) - 1}; give rising indices of "
            "these"
        )
    if given and options.kd_teacher_stages:
        if len(given) != len(theirs):
            raise UsageError(
                f"--kd-student-stages, --kd-teacher-stages: {len(given)} levels against {len(theirs)} maps; pass as "
                "many of each"
            )
        return list(zip(given, range(len(theirs)), strict=True))
    levels = given or list(range(len(own)))
    pairs: dict[int, int] = {}
    for k, (height, width) in enumerate(theirs):
        finer = [level for level in levels if own[level][0] >= height and own[level][1] >= width]
        pairs[max(finer, default=levels[0])] = k
    return sorted(pairs.items())


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
    kind: str,
    options: argparse.Namespace,
    student: Detector,
    teacher: Detector,
    name: str,
    known: torch.Tensor | None,
) -> Objective:
    count = min(len(student.widths), len(teacher.widths))  # the coarsest levels
    stages = tuple(tuple(range(len(d.widths) - count, len(d.widths))) for d in (student, teacher))
    widths = student.widths[-count:], teacher.widths[-count:]
    norm, projector = options.kd_feature_norm, options.kd_projector
    if kind == "feature":
        return MultiScale(kind, projector, (stages[0], stages[1]), widths, norm, options.kd_feature_loss)
    if kind == "token":
        if norm == "phi-s":
            raise UsageError(
                "--kd-feature-norm phi-s: it is for maps, not for detection tokens; take standardize, or "
                "--kd-distill-type feature"
            )
        if student.token_width is None or teacher.token_width is None:
            raise UsageError(
                f"--kd-distill-type token: {options.model} has no detection tokens; take feature and prediction"
            )
        both = (student.token_width, teacher.token_width)
        distance, root = options.kd_feature_loss, options.kd_token_root
        return Tokens(kind, projector, (stages[0], stages[1]), widths, both, norm, distance, root)
    if known is None:
        raise UsageError(
            f"--kd-distill-type prediction: the teacher {name} does not predict all classes of the data; "
            "take token or feature"
        )
    if not student.sigmoid:
        raise UsageError(
            f"--kd-distill-type prediction: the student {options.model} has a softmax over its classes; take token"
        )
    if student.dense and teacher.kind not in (None, student.kind):
        raise UsageError(
            f"--kd-distill-type prediction: the teacher {name} and the student {options.model} write boxes in "
            "different ways, and have different numbers of them at a place; take feature, or a teacher of the "
            "student's kind"
        )
    return Predictions(kind, student.dense, known, softmax=not teacher.sigmoid)
