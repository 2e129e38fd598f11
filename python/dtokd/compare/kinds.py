"""What a comparison asks of the command that its runs are: `dtokd train` or `dtokd detect`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.task import TrainingTask

from ..objectives.teacher import as_list
from ..train import data, heldout
from ..train.fit import Outcome
from ..train.progress import Progress
from ..train.run import prepare, train
from ..train.rundir import RunDir
from ..train.world import World


class Classifying:
    """Runs of `dtokd train`."""

    def objectives(self, options: argparse.Namespace) -> int:
        """How many distillation objectives these options make; raises UsageError: they contradict each other."""
        teachers = as_list(options.kd_model_name)
        if len(teachers) > 1 and not options.kd_cache_teacher:  # of those with other classes the features alone
            return len(self.make(options)[0].distill_loss_weights)
        return len(teachers) * len(as_list(options.kd_distill_type))

    def make(self, options: argparse.Namespace) -> tuple[Any, data.Data]:
        """A run's task and loaders, on the CPU; raises UsageError: as the run would before its first step."""
        return _made(prepare, options)

    def open(self, options: argparse.Namespace, split: str) -> Any:
        """A split; raises UsageError: there is none."""
        return data.open_dataset(options, split)

    def images(self, split: Any) -> int:
        """How many a split has; 0 for a stream."""
        return len(split) if hasattr(split, "__len__") else 0

    def identity(self, options: argparse.Namespace, split: Any, name: str) -> str | None:
        """What tells a split from others, if that is known."""
        return data.identity_of(options, split)

    def check_held_out(self, options: argparse.Namespace, split: Any) -> None:
        """Raises UsageError: so many training images cannot be held out, or a rule would not choose in the run."""
        trained, held = heldout.split(options, split)
        if held is not None:
            _check_window(options, len(trained))

    def train(self, options: argparse.Namespace, progress: Progress) -> Outcome:
        """One run."""
        return train(options, progress)


class Detecting:
    """Runs of `dtokd detect`, whose modules need packages that `dtokd train` does without."""

    def __init__(self, options: argparse.Namespace) -> None:
        from ..detect.install import check_installed

        check_installed(options)

    def objectives(self, options: argparse.Namespace) -> int:
        """See `Classifying`."""
        from ..detect.build import objectives_of

        return objectives_of(options)

    def make(self, options: argparse.Namespace) -> tuple[Any, data.Data]:
        """See `Classifying`."""
        from ..detect.run import prepare as prepare_detector

        return _made(prepare_detector, options)

    def open(self, options: argparse.Namespace, split: str) -> Any:
        """See `Classifying`."""
        from ..detect.data import read_split

        return read_split(options, split)

    def images(self, split: Any) -> int:
        """See `Classifying`."""
        return len(split.image_ids)

    def identity(self, options: argparse.Namespace, split: Any, name: str) -> str | None:
        """See `Classifying`."""
        from ..detect.data import CocoImages

        return data.identity_of(options, CocoImages(options.data_dir / name, split, None))

    def check_held_out(self, options: argparse.Namespace, split: Any) -> None:
        """See `Classifying`."""
        from ..detect.heldout import split as hold_out

        trained, held = hold_out(options, split, World())
        if held is not None:
            _check_window(options, len(trained.image_ids))

    def train(self, options: argparse.Namespace, progress: Progress) -> Outcome:
        """See `Classifying`."""
        from ..detect.run import detect

        return detect(options, progress)


def _check_window(options: argparse.Namespace, images: int) -> None:
    batches = max(images // options.batch_size, 1)  # as the loader, which drops the last part of a batch
    heldout.check_window(options, options.epochs * -(-batches // options.grad_accum_steps))


def _made(
    prepare: Callable[..., tuple[TrainingTask, data.Data, Any, Any, Any]], options: argparse.Namespace
) -> tuple[Any, data.Data]:
    own = argparse.Namespace(**{**vars(options), "device": "cpu", "kd_teacher_compile": False})
    progress = Progress(own.epochs)
    progress.console.quiet = True
    task, loaders, *_ = prepare(own, RunDir(Path(own.output)), World(), progress)
    return task, loaders


def detects(options: argparse.Namespace) -> bool:
    """Whether options are those of `dtokd detect`."""
    return "annotations" in options


def kind_of(options: argparse.Namespace) -> Classifying | Detecting:
    """Whose options these are."""
    return Detecting(options) if detects(options) else Classifying()
