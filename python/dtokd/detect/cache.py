"""A detector's predictions on disk, see `dtokd.objectives.cache`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import identity
from ..errors import UsageError
from ..objectives.base import Objective
from ..objectives.build import cache_told, folder_of
from ..objectives.cache import OPTION, TOO_LARGE, CachedImages, TeacherCache, TopPlaces, Whole
from ..objectives.detection import Predictions
from ..objectives.task import merge
from ..objectives.teacher import Teacher
from .batch import Images, padded
from .detectors.base import Detector

#: What is asked of a teacher when its task is made.
_FACTS = ("dense", "kind", "queries", "sigmoid", "classes", "widths", "token_width")


class AbsentDetector(Detector):
    """In a teacher's place where all its predictions are stored.

    Args:
        facts: noted by `prepare_cache`.
    """

    absent = True

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__()
        for name in _FACTS:
            if name in facts:  # an older cache has no kind
                setattr(self, name, facts[name])
        self.columns: Tensor | None = None if facts["columns"] is None else torch.tensor(facts["columns"])


def open_cache(options: argparse.Namespace, images: CachedImages, name: str, path: str | None) -> TeacherCache:
    """The teacher's, perhaps without a file yet.

    Args:
        options: of `detect.options`.
        images: that it is of.
        name, path: of the teacher and its weights.

    Raises:
        UsageError: it is one of something else; or rows would have different sizes.
    """
    weights = [identity.of_path(Path(place)) for place in (path, name) if place and Path(place).exists()]
    told = {
        "--kd-model-name": name,
        "--kd-model-kwargs": options.kd_model_kwargs,
        "weights (sha256)": weights,
        "autocast": options.amp_dtype if options.amp else None,
        **cache_told(options),
    }
    return TeacherCache(folder_of(options, images, 0, name), images, told)


def prepare_cache(
    cache: TeacherCache,
    options: argparse.Namespace,
    teacher: Teacher,
    objectives: Sequence[Objective],
    known: Tensor | None,
    device: torch.device,
) -> None:
    """Choose what is kept, and find the size of a row.

    Args:
        cache: of `open_cache`.
        options: of `detect.options`.
        teacher: whose cache it is, perhaps an `AbsentDetector`.
        objectives: that read it.
        known: which of its classes are the data's.
        device: of the teacher.

    Raises:
        UsageError: an objective reads more than predictions; or images have different numbers of places, and all of
            them are to be kept.
    """
    detector: Any = teacher.model
    k, dtype = options.kd_cache_topk, getattr(torch, options.kd_cache_dtype)
    facts = {name: getattr(detector, name) for name in _FACTS}
    predictions = [o for o in objectives if isinstance(o, Predictions)]
    if len(predictions) != len(objectives):
        raise UsageError(TOO_LARGE)
    if k is None and detector.dense and not options.square:
        raise UsageError(
            f"{OPTION}: images of different sizes have different numbers of places, and a row has room for "
            "--kd-cache-topk of them; pass it (1000, for example), or --square"
        )
    kept = Whole(dtype) if k is None else TopPlaces(dtype, k, predictions[0].sureness)
    taps = merge([o.teacher for o in objectives])
    cache.keep(kept, taps, {**facts, "columns": None if known is None else known.tolist()})
    if not isinstance(detector, AbsentDetector):
        side = padded(options.img_size)
        mask = torch.ones(1, side, side, dtype=torch.bool)
        cache.lay_out(teacher(Images(torch.zeros(1, 3, side, side), mask, [(side, side)]).to(device), taps))
