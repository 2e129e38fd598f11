"""What runs of all kinds have in common: directory, optimizer, schedule, epochs, evaluation, checkpoints, report."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import distribute_bn, random_seed, unwrap_model
from torch import Tensor

from ..card import CARD
from ..datafree.options import BESIDES
from ..errors import UsageError
from ..files import as_json, write_text, writing
from ..lopsided import REMEDY, LopsidedWeights, may_be_lopsided
from ..metric import chosen_by, is_lower_better, replaces
from ..monitor import CSV, BalanceLogger, Row, Sink, columns_of, means_of
from ..objectives.cache import TeacherCache
from ..objectives.task import DistillationTask
from ..readme import write_readme
from ..report.conclusion import read_baseline
from ..report.page import write_report
from ..texts import read_notes
from . import data, heldout, state
from .about import ABOUT, Known, find_out, lines_of
from .checkpoint import load_run
from .engine import Engine
from .images import skipped
from .optimizer import distribute, make_stepper
from .progress import Progress, Seldom
from .rehearsal import rehearse
from .rundir import RunDir, chained
from .signals import Stopped, signals
from .state import Position
from .trackers import Tracker, check_installed, open_trackers
from .world import World, join

#: Keeps the seeds of the epochs of neighbouring `--data-seed`s apart.
_PRIME = 1_000_003


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        path: its directory.
        best: the best epoch's evaluation, with "epoch"; None without a validation split.
        interrupted: the number of the signal that ended it early, or 0.
    """

    path: Path
    best: dict[str, float] | None
    interrupted: int = 0

    @property
    def exit_code(self) -> int:
        """Of a command that was this run: 0, or 128 and the number of the signal."""
        return 128 + self.interrupted if self.interrupted else 0


@contextmanager
def opened(options: argparse.Namespace, name: Callable[[], str], progress: Progress) -> Iterator[tuple[RunDir, World]]:
    """The run's directory, which is ours while this goes on, and the processes that train together.

    Args:
        options: of `train.options` or `detect.options`.
        name: of the directory, where --experiment gives none.
        progress: what the user sees: nothing but of the first process.

    Raises:
        UsageError: the directory is in use, --baseline is no run without a teacher, or as `name`.
    """
    with join(options.device, options.dist_timeout) as world, ExitStack() as stack:
        if not world.first:
            progress.console.quiet = True
        if options.dry_run:
            options.kd_cache_teacher = None  # it would be written
        with world.agreed():
            named = name()
            if options.baseline is not None:
                read_baseline(options.baseline)  # reports need it: an unfit one would end the run after an epoch
            run = RunDir(options.output / (options.experiment or named))
        world.first_does(lambda: stack.enter_context(run.locked()))
        yield run, world


def fit(
    options: argparse.Namespace,
    run: RunDir,
    task: DistillationTask,
    loaders: data.Data,
    device: torch.device,
    progress: Progress,
    world: World,
    card: dict[str, Any],
    known: Known,
) -> Outcome:
    """Train a task.

    Args:
        options: of `train.options`, but those of data, student and teacher.
        run: the directory, which this process has locked.
        task: student, teacher and losses; its `create_evaluator()` judges the student.
        loaders: of (input, target), on `device`.
        device: of the student.
        progress: what the user sees.
        world: the processes that train together.
        card: what the student is, for `config.json`.
        known: what else is known, for `about.json`.

    Raises, Effects: as `run.train`.
    """
    check_installed(options)
    if options.channels_last:
        task.to(memory_format=torch.channels_last)
    with world.agreed():
        stepper = make_stepper(options, task, device, world)
    groups = state.told_of(stepper.optimizer)
    if options.model_ema:
        task.setup_ema(decay=options.model_ema_decay, use_warmup=options.model_ema_warmup)
    per_epoch = -(-len(loaders.train) // options.grad_accum_steps)
    keywords = {**scheduler_kwargs(options, decreasing_metric=is_lower_better(options.eval_metric))}
    try:
        scheduler, epochs = create_scheduler_v2(
            stepper.optimizer, **{**keywords, "num_epochs": options.epochs}, updates_per_epoch=per_epoch
        )
    except (AssertionError, ValueError) as error:
        given = " --sched-on-updates" if options.sched_on_updates else ""
        raise UsageError(f"--sched {options.sched}{given}, --epochs {options.epochs}: {error}") from error
    if getattr(options, "torchcompile", None):
        _compile(options, task)
    if world.joined:
        with world.agreed():
            distribute(task, stepper, options, device)
    progress.epochs = epochs
    with world.agreed():
        for cache in _caches(task):
            cache.reserve(progress.say)
    found = _find(run, options, world, progress)
    with ExitStack() as stack:
        stack.enter_context(writing(run.path, "--output"))  # a log's lines, a folder's names
        noted = stack.enter_context(signals())
        engine = Engine(
            task, stepper, scheduler, options, device, None, progress, lambda: world.vote(noted[0]), world=world
        )
        engine.groups, engine.per_epoch = groups, per_epoch
        engine.names = card.get("label_names")
        if loaders.batches is not None:
            images = loaders.batches.dataset
            engine.data = world.first_does(lambda: data.identity_of(options, images))
        if loaders.held_out is not None and loaders.judges is not None:
            heldout.check_window(options, epochs * per_epoch)
            engine.held_out = heldout.HeldOutImages(
                loaders.held_out,
                options.kd_held_out_every,
                loaders.judges,
                stepper,
                engine.autocast,
                options.channels_last,
                progress.say,
            )
        if may_be_lopsided(stepper.weighting):
            engine.lopsided = LopsidedWeights(
                lambda text: progress.say(f"warning: {text}"),
                f"--kd-balance whilebetter, or {REMEDY} if the teacher has other classes (docs/weightings.md)",
            )
        with world.agreed():
            at = state.restore(engine, loaders, *found) if found else Position(0)
            if not found:
                engine.estimate(loaders.train)
        if options.dry_run:
            rehearse(engine, loaders, run)
            return Outcome(run.path, None)
        before = world.first_does(lambda: read_notes(run.path / ABOUT))
        about = find_out(engine, loaders, known, before)
        for line in lines_of(about, options.eval_metric):
            progress.say(line)
        columns = columns_of(("task", *task.distill_loss_weights))
        if not world.first_does(lambda: run.begin(options, found, columns, progress.say)):
            at = replace(at, best=None, history="", students={})
        if world.first:
            progress.keep_in(run.log)
        for name, held in ((CARD, card), (ABOUT, about)):
            world.first_does(partial(write_text, run.path / name, as_json(held, indent=2) + "\n"))
        anew, found = found is None, None  # its tensors need no room any more
        collected = _Collected()
        if loaders.synthetic is not None:
            stack.enter_context(loaders.synthetic.attached(run.generator, engine.stopped))
        with world.agreed():
            trackers = open_trackers(run.path, options, engine.updates, progress.say) if world.first else []
        for tracker in trackers:
            stack.callback(tracker.close)
        if options.kd_balance != "none":
            sinks: list[Sink] = [CSV(run.steps, append=True), collected] if world.first else []
            sinks += trackers
            sinks += [engine.lopsided] if engine.lopsided is not None and world.first else []
            engine.log = stack.enter_context(BalanceLogger(sinks, options.log_interval, step=engine.updates))
        collected.rows = list(at.rows)
        ranks = f" of {world.size} processes" if world.joined else ""
        progress.say(f"{run.path}: {options.model}, {max(epochs - at.epoch, 0)} of {epochs} epochs, on {device}{ranks}")
        if anew:
            _save(run, engine, loaders, at)
        seldom, skips = Seldom(), 0
        try:
            while at.epoch < epochs:
                if number := engine.stopped():
                    raise Stopped(number)
                if not at.batches:
                    at = replace(at, updates=engine.updates, lr=stepper.lr)
                at = _epoch(run, engine, loaders, collected, at, trackers)
                skips = _tell_skipped(run, progress, world, skips)
                seldom(partial(_report, run, progress, world))
        except Stopped as stop:
            return _stop(run, engine, loaders, collected, at, stop)
        finally:
            _report(run, progress, world)
    name = chosen_by(options)
    if at.best is not None and math.isnan(at.best[name]):
        progress.say(f"{name} is nan in all epochs, so none is the best; {run.student} is the last one's")
    elif at.best is not None:
        progress.say(f"best {name} {at.best[name]:.4g} in epoch {at.best['epoch'] + 1:.0f}: {run.student}")
    return Outcome(run.path, at.best)


def _report(run: RunDir, progress: Progress, world: World) -> None:
    """The page and the model card. An error here becomes a line: it must not end a run, nor hide why one has ended."""
    try:
        if world.first and run.summary.exists():
            write_report(run.path)
            write_readme(run.path)
    except Exception as error:  # the disk, a file that was changed by hand
        reason = str(error) or type(error).__name__
        progress.say(f"warning: {run.report} was not written: {reason}; dtokd report {run.path} writes it later")


def _tell_skipped(run: RunDir, progress: Progress, world: World, before: int) -> int:
    """The images that no earlier epoch has skipped; how many there are now."""
    lines = skipped(run.bad_images) if world.first else []
    new = lines[before:]
    for line in new[:10]:
        progress.say(f"skipped image: {line}")
    if len(new) > 10:
        progress.say(f"skipped image: {len(new) - 10} more, see {run.bad_images}")
    return len(lines)


def _find(
    run: RunDir, options: argparse.Namespace, world: World, progress: Progress
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, found by the first rank and read by all."""
    found: list[tuple[Path, dict[str, Any]]] = []

    def find() -> Path | None:
        found.extend(filter(None, [run.find(options, progress.say)]))
        return found[0][0] if found else None

    path = world.first_does(find)
    with world.agreed():
        if path is not None and not found:
            found.append((path, load_run(path)))
    return found[0] if found else None


def _compile(options: argparse.Namespace, task: DistillationTask) -> None:
    import torch._functorch.config

    # several backward passes read what one alone may overwrite
    torch._functorch.config.donated_buffer = options.kd_balance == "none"
    task.compile(backend=options.torchcompile, mode=options.torchcompile_mode)


class _Collected:
    """An epoch's balanced steps."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def write(self, rows: Any, means: Any) -> None:
        """Keep them."""
        self.rows.extend(rows)

    def close(self) -> None:
        """Do nothing, as there is no file to close."""

    def take(self) -> Row:
        """Their means; they are forgotten."""
        rows, self.rows = self.rows, []
        return {key: value for key, value in means_of(rows).items() if key != "step"} if rows else {}


def _epoch(
    run: RunDir,
    engine: Engine,
    loaders: data.Data,
    collected: _Collected,
    at: Position,
    trackers: Sequence[Tracker],
) -> Position:
    """Train, evaluate, and have it all on disk: the checkpoint last, so that it vouches for the rest."""
    options, task, epoch = engine.options, engine.task, at.epoch
    if loaders.mixup is not None and options.mixup_off_epoch and epoch >= options.mixup_off_epoch:
        loaders.mixup.mixup_enabled = False
    sampler: Any = getattr(loaders.train, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    if options.data_seed is not None and not at.batches:
        random_seed((options.data_seed + epoch * _PRIME) % 2**31, engine.world.rank)
    start = time.monotonic()
    losses = engine.train_epoch(loaders.train, epoch, at.batches, at.means)
    _flush(engine)
    iterations = max(len(loaders.train) - at.batches, 1)
    per_iteration = (time.monotonic() - start) / iterations
    if engine.world.size > 1 and options.dist_bn:
        for module in state.modules(task).values():
            distribute_bn(module, engine.world.size, options.dist_bn == "reduce")
    metrics: dict[str, float] = {}
    if loaders.validation is not None:
        metrics = engine.evaluate(loaders.validation)
        if task.has_ema():
            averaged = engine.evaluate(loaders.validation, ema=True)
            metrics |= {f"ema_{name}": value for name, value in averaged.items()}
    name, best = chosen_by(options), at.best
    if engine.scheduler is not None:
        judged = metrics.get(name, math.nan)
        engine.scheduler.step(epoch + 1, None if math.isnan(judged) else judged)
    row = {"epoch": epoch} | {f"train_{name}": value for name, value in losses.items()}
    row |= {f"eval_{name}": value for name, value in metrics.items()}
    row |= {"lr": at.lr, **collected.take(), "iteration_seconds": round(per_iteration, 6)}
    row |= {} if loaders.synthetic is None else loaders.synthetic.take()
    row["teacher_seconds"] = round(engine.teacher_seconds / iterations, 6)
    row["seconds"] = round(time.monotonic() - start, 3)
    if per_iteration and engine.teacher_seconds:
        share = min(row["teacher_seconds"] / per_iteration, 1)
        besides = "" if loaders.synthetic is None else BESIDES
        engine.progress.say(
            f"epoch {epoch + 1}/{engine.progress.epochs}  {share:.0%} of an iteration's time is the teacher's{besides}"
        )
    if metrics:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        engine.progress.say(f"epoch {epoch + 1}/{engine.progress.epochs}  evaluation  {shown}")
    better = bool(metrics) and replaces(metrics[name], None if best is None else best[name], is_lower_better(name))
    if better:
        best = {"epoch": epoch, **metrics}
    weights = _student(task, ema=task.has_ema())

    def write() -> dict[str, str]:
        run.add_summary(row)
        if loaders.synthetic is not None:
            loaders.synthetic.draw(run.picture(epoch + 1))
        for tracker in trackers:
            tracker.scalars(_scalars(row), engine.updates - 1)  # where the epoch's last step is
        exported = {run.last_student.name: run.export(run.last_student, weights)}
        if better or (not metrics and best is None):  # without an evaluation the last one, but not after one
            exported[run.student.name] = run.export(run.student, weights)
            details = engine.judged.details() if metrics and hasattr(engine.judged, "details") else {}
            run.write_classes({"epoch": epoch, "names": engine.names, **details} if details else None)
        return exported

    students = {**at.students, **engine.world.first_does(write)}
    at = Position(epoch + 1, best, history=chained([row], at.history), students=students)
    _save(run, engine, loaders, at)
    return at


def _scalars(row: Mapping[str, float]) -> dict[str, float]:
    """An epoch's losses, evaluation and learning rate, by TensorBoard's groups."""
    named = {name.replace("_", "/", 1): value for name, value in row.items() if name.startswith(("train_", "eval_"))}
    return {**named, "lr": row["lr"]}


def _caches(task: DistillationTask) -> list[TeacherCache]:
    return [cache for cache in task.caches if cache is not None]


def _flush(engine: Engine) -> None:
    for cache in _caches(engine.task):
        cache.flush()
    if engine.log is not None:
        engine.log.flush()


def _save(run: RunDir, engine: Engine, loaders: data.Data, at: Position) -> None:
    """A checkpoint, by the first rank; in the middle of an epoch under a name of its own."""
    collected = state.collect(engine, loaders, at)
    keep = engine.options.checkpoint_hist

    def write() -> None:
        if at.batches:
            run.save_stopped(collected)
        else:
            run.save(at.epoch, collected, keep)

    engine.world.first_does(write)


def _stop(
    run: RunDir, engine: Engine, loaders: data.Data, collected: _Collected, at: Position, stop: Stopped
) -> Outcome:
    """Save where the run is, and print how it goes on."""
    _flush(engine)
    saved = f"{at.epoch} finished epochs"
    if loaders.batches is not None and stop.batches:
        _save(run, engine, loaders, replace(at, batches=stop.batches, means=stop.means, rows=collected.rows))
        saved += f" and {stop.batches} iterations"
    engine.progress.say(f"stopped; {saved} are saved: the same command with --resume auto goes on")
    return Outcome(run.path, at.best, stop.signal)


def _student(task: DistillationTask, ema: bool) -> dict[str, Tensor]:
    """Without projector and teacher."""
    weights: dict[str, Tensor] = unwrap_model(task.get_eval_model(ema=ema)).state_dict()
    return weights
