"""Which runs a comparison has, what all of them depend on, and what each has come to."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import identity
from ..errors import UsageError
from ..files import as_json, write_text
from ..objectives.teacher import as_list, resolve_teachers
from ..report.columns import read_columns
from ..texts import read_json
from ..train import optimizer
from ..train.options import OUTSIDE, flag, plain
from ..train.rundir import environment
from .arms import NONE, apply, folder_of, parse_arms
from .kinds import detects, kind_of
from .options import OWN

#: Options that count epochs, which a shorter schedule shortens.
_EPOCHS = ("warmup_epochs", "cooldown_epochs", "mixup_off_epoch")
#: Options whose files count by their contents.
_FILES = ("class_map", "initial_checkpoint", "backbone_checkpoint", "kd_teacher_path")
#: Options that name models, which may be in a directory.
_MODELS = ("model", "kd_model_name")
#: Options that name a place, of which the contents count; and options that each run sets.
_PLACES = (*OUTSIDE, "data_dir", "kd_cache_teacher", "device", "seed", "data_seed")


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm: its text.
        seed: of the initial student, and of the batches.
        options: of `train.options`; `output` / `experiment` is the run's directory.
    """

    arm: str
    seed: int
    options: argparse.Namespace

    @property
    def path(self) -> Path:
        """The run's directory."""
        return Path(self.options.output) / str(self.options.experiment)

    @property
    def columns(self) -> dict[str, list[float]]:
        """What its `summary.csv` holds now, an epoch per row."""
        return read_columns(self.path / "summary.csv")


@dataclass(frozen=True)
class Result:
    """What a run has come to; kept in its directory.

    Attributes:
        chosen, judged: the last epoch's metric on the split that chooses, and on the one that judges.
        seconds: of the whole run.
        diverged: why it has; the numbers are NaN then.
        jobs: runs at a time while it was trained.
    """

    chosen: float
    judged: float
    seconds: float = math.nan
    diverged: str = ""
    jobs: int = 1

    @classmethod
    def read(cls, run: Run) -> Result | None:
        """None before the run is finished.

        Raises:
            UsageError: the file is damaged.
        """
        file = run.path / "finished.json"
        if not file.exists():
            return None
        try:
            held = read_json(file)
            chosen, judged, seconds = (
                math.nan if held[key] is None else float(held[key]) for key in ("chosen", "judged", "seconds")
            )
            return cls(chosen, judged, seconds, str(held["diverged"]), int(held.get("jobs", 1)))
        except (ValueError, TypeError, LookupError) as error:
            raise UsageError(f"--experiment: {file} is damaged ({error}); remove it, and the run goes on") from error

    def write(self, run: Run) -> None:
        """Mark the run as finished. Its checkpoints go, which many runs would fill a disk with; the students stay."""
        write_text(run.path / "finished.json", as_json(vars(self), indent=1) + "\n")
        shutil.rmtree(run.path / "checkpoints", ignore_errors=True)


class Plan:
    """All runs of a comparison.

    Args:
        options: of `compare.options`.

    Attributes:
        folder: of the comparison.
        options: of the arms' runs before an arm changes them, with the shorter schedule.
        kind: of its runs.
        seeds: see `--seeds`.
        arms: from each arm's text to the options that it changes.
        judges: the split that judges; the one that chooses if there is no other.
        images: of the split that judges; 0 if that is not known.

    Raises:
        UsageError: an arm, the seeds, or an option that all share is of no use.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        if twice := sorted({seed for seed in options.seeds if options.seeds.count(seed) > 1}):
            raise UsageError(f"--seeds: {twice[0]} is there twice; pass different ones, such as 0 1 2")
        if getattr(options, "data_free", None):
            raise UsageError(
                "--data-free: a comparison trains a student without a teacher, which needs images; leave it out, or "
                "compare runs of dtokd train with dtokd report"
            )
        if not options.val_split:
            raise UsageError("--val-split: empty, but a comparison needs evaluations; name a split")
        if options.judge_split == options.val_split:
            raise UsageError(
                f"--judge-split: {options.judge_split!r} is the --val-split too; name another split, or leave it out"
            )
        self.folder = options.output / (options.experiment or "compare")
        self.seeds: Sequence[int] = options.seeds
        self.options = _shortened(options)
        self.kind = kind_of(self.options)
        if not detects(self.options):
            resolve_teachers(self.options)
        if not self.options.kd_model_name:
            raise UsageError("--kd-model-name: missing, but there is nothing to compare without a teacher")
        self.arms = parse_arms(options.arms, self.kind.objectives(self.options), detects(self.options))
        self.judges = options.judge_split or options.val_split
        self._data, self.images = {}, 0
        for split in dict.fromkeys((options.train_split, options.val_split, self.judges)):
            images = self.kind.open(self.options, split)
            self._data[split] = self.kind.identity(options, images, split)  # None: not known
            if split == self.judges:
                self.images = self.kind.images(images)
            if split == options.train_split:
                self._check_arms(images)

    def _check_arms(self, images: Any) -> None:
        """Raises UsageError: an arm would be refused when its turn comes, or is another one with these options."""
        seen: dict[str, argparse.Namespace] = {}
        for arm, changes in self.arms.items():
            own = apply(self.options, changes)
            if same := [other for other, theirs in seen.items() if theirs == own]:
                raise UsageError(
                    f"--arms: {same[0]!r} and {arm!r} are the same with these options; leave one of them out"
                )
            seen[arm] = own
            try:
                optimizer.check(own)
                self.kind.check_held_out(own, images)
            except UsageError as error:
                raise UsageError(f"--arms: {arm!r}: {error}") from error

    def try_models(self) -> None:
        """Make student and teachers once, so that what does not fit is found before the first run.

        Raises:
            UsageError: as a run would, or the errors of student and teacher are to be compared and cannot be.
        """
        if self.options.kd_cache_teacher:  # whose teachers need not be there
            return
        looking = [arm for arm, changes in self.arms.items() if changes["kd_balance"] == "whilebetter"]
        arm = (looking or [arm for arm in self.arms if arm != NONE])[0]
        _, loaders = self.kind.make(apply(self.options, self.arms[arm]))
        if looking and not (loaders.judges and loaders.judges.teachers):
            raise UsageError(
                f"--arms: {arm!r}: no teacher predicts the student's classes, so that their errors cannot be compared; "
                "leave it out"
            )

    def runs(self) -> Iterator[Run]:
        """Seed by seed, so that an early end leaves whole pairs."""
        for seed in self.seeds:
            for arm, changes in self.arms.items():
                own = apply(self.options, changes)
                own.seed = own.data_seed = seed
                own.resume, own.output, own.experiment = "auto", self.folder / folder_of(arm), f"seed-{seed}"
                own.checkpoint_hist = 1
                yield Run(arm, seed, own)

    def told(self) -> dict[str, dict[str, Any]]:
        """All that the results of the runs depend on, besides arm and seed: by kind, then by name."""
        told = {key: value for key, value in plain(self.options).items() if key not in _PLACES}
        told["judge_split"] = self.judges
        if self.options.kd_cache_teacher:  # wherever it is: the images have an order of their own
            told["kd_cache_teacher"] = True
        files = {key: [identity.of_path(Path(path)) for path in as_list(told.get(key) or None)] for key in _FILES}
        for key in _MODELS:
            folders = [folder for name in as_list(told.get(key)) if (folder := self._folder_of(name)) is not None]
            files[key] = [identity.of_path(folder) for folder in folders]
        machine = {key: v for key, v in environment(self.options).items() if key not in ("cores", "threads")}
        return {
            "options": {key: value for key, value in told.items() if key not in _FILES},
            "files": files,
            "data": self._data,
            "environment": machine,
        }

    def _folder_of(self, name: str) -> Path | None:
        """The directory that a model's name stands for, if it does."""
        kind, _, rest = name.partition(":")
        if kind.lower() == "local-dir":  # timm's
            return Path(rest)
        return Path(name) if detects(self.options) and Path(name).is_dir() else None  # as transformers writes it

    def check(self) -> bool:
        """Compare with what the folder holds. Nothing is written.

        Returns:
            Whether it holds this comparison already.

        Raises:
            UsageError: it holds another one, or a damaged one.
        """
        if (self.folder / "args.yaml").exists():
            raise UsageError(
                f"--experiment: {self.folder} holds a run of dtokd train; choose another --experiment or --output"
            )
        file, now = self.folder / "comparison.json", json.loads(as_json(self.told()))
        if not file.exists():
            return False
        try:
            before = read_json(file)
            changed = [
                (kind, key, before[kind].get(key), now[kind].get(key))
                for kind in now
                for key in {**before[kind], **now[kind]}
                if before[kind].get(key) != now[kind].get(key)
            ]
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise UsageError(
                f"--experiment: {file} is damaged ({error}); choose another --experiment or --output"
            ) from error
        if changed:
            told = "; ".join(_change(*change) for change in changed[:3])
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UsageError(
                f"--experiment: {self.folder} holds a comparison with other settings: {told}{more}; give those, or "
                "choose another --experiment or --output"
            )
        return True

    def begin(self) -> None:
        """Note what the results depend on, after `check`."""
        write_text(self.folder / "comparison.json", as_json(self.told(), indent=1) + "\n")


def _change(kind: str, key: str, before: Any, now: Any) -> str:
    if kind == "data":
        return f"the images of {key!r} have changed"
    if kind == "files":
        return f"the file or directory of {flag(key)} has changed"
    return f"{flag(key) if kind == 'options' else key} was {before!r}, is now {now!r}"


def _shortened(options: argparse.Namespace) -> argparse.Namespace:
    """Without the comparison's own options; epochs are those of the shorter schedule."""
    own = argparse.Namespace(**{key: value for key, value in vars(options).items() if key not in OWN})
    own.dry_run = False  # of a run
    share = options.schedule_share
    if share < 1:
        own.epochs = max(1, round(share * own.epochs))
        for key in _EPOCHS:
            if key in own:
                setattr(own, key, round(share * getattr(own, key)))
        if getattr(own, "mixup_off_epoch", 0) == 0 < getattr(options, "mixup_off_epoch", 0):
            own.mixup_off_epoch = 1  # 0 is never
        own.decay_epochs = max(share * own.decay_epochs, 1e-3)
        own.decay_milestones = [max(1, round(share * value)) for value in own.decay_milestones]
    return own
