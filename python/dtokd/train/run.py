"""A run from its options to its directory."""

from __future__ import annotations

import argparse
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import load_checkpoint as load_weights
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import TrainingTask, create_classification_loss
from timm.utils import random_seed, unwrap_model
from torch import Tensor, nn

from .. import networks as _networks  # noqa: F401  registers CIFAR's with timm
from ..errors import UsageError
from ..monitor import CSV, BalanceLogger, Row, Sink, TensorBoard, means_of
from ..objectives.build import build, check_teachers, use_cache
from ..report.page import write_report
from . import data
from .checkpoint import check_fits, random_state, set_random_state
from .engine import Engine, Stopped
from .images import skipped
from .optimizer import make_stepper
from .options import OUTSIDE, experiment_name, plain
from .progress import Progress
from .rundir import RunDir


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


def train(options: argparse.Namespace, progress: Progress | None = None) -> Outcome:
    """Train, or go on training, as the options say.

    Args:
        options: of `train.options`.
        progress: what the user sees.

    Raises:
        UsageError: an option, the data, a model or a checkpoint is of no use, or the disk is full.

    Effects: seeds the random generators of Python, numpy and torch; writes the run's directory; while it runs,
        Ctrl-C and SIGTERM end it after the current iteration.
    """
    run = RunDir(options.output / (options.experiment or experiment_name(options)))
    device = torch.device(options.device if options.device != "cuda" or torch.cuda.is_available() else "cpu")
    train_images = data.open_dataset(options, options.train_split, run.bad_images)
    validation_images = data.open_dataset(options, options.val_split, run.bad_images) if options.val_split else None
    classes = data.number_of_classes(options, train_images, validation_images)
    random_seed(options.seed, 0)
    student: Any = make_student(options, classes).to(device)
    config = resolve_data_config(vars(options), model=student)
    # timm's tasks translate the student's normalization into the teacher's: it has to be the one in use
    student.pretrained_cfg = {**student.pretrained_cfg, "mean": config["mean"], "std": config["std"]}
    loaders = data.make_loaders(options, train_images, validation_images, config, student.num_classes, device)
    task = _make_task(options, student, loaders, device, config["input_size"])
    return fit(options, run, task, loaders, device, progress)


def fit(
    options: argparse.Namespace,
    run: RunDir,
    task: TrainingTask,
    loaders: data.Data,
    device: torch.device,
    progress: Progress | None = None,
) -> Outcome:
    """What all kinds of tasks have in common: optimizer, schedule, epochs, evaluation, checkpoints, report.

    Args:
        options: of `train.options`, but those of data, student and teacher.
        run: the directory.
        task: student, teacher and losses; its `create_evaluator()` judges the student.
        loaders: of (input, target), on `device`.
        device: of the student.
        progress: what the user sees.

    Raises, Effects: as `train`.
    """
    if options.channels_last:
        task.to(memory_format=torch.channels_last)
    stepper = make_stepper(options, task, device)
    if options.model_ema:
        task.setup_ema(decay=options.model_ema_decay, use_warmup=options.model_ema_warmup)
    per_epoch = -(-len(loaders.train) // options.grad_accum_steps)
    scheduler, epochs = create_scheduler_v2(
        stepper.optimizer,
        **{**scheduler_kwargs(options, decreasing_metric=options.eval_metric == "loss"), "num_epochs": options.epochs},
        updates_per_epoch=per_epoch,
    )
    if getattr(options, "torchcompile", None):
        _compile(options, task)
    progress = progress or Progress(epochs)
    progress.epochs = epochs
    found = run.begin(options)
    with ExitStack() as stack:
        stopped = stack.enter_context(_signals())
        engine = Engine(task, stepper, scheduler, options, device, None, progress, lambda: bool(stopped[0]))
        first, best = _resume(engine, *found, progress) if found else (0, None)
        collected = _Collected()
        if options.kd_balance != "none":
            sinks: list[Sink] = [CSV(run.steps, append=True), collected]
            if options.log_tensorboard and (board := _tensorboard(run, progress)):
                sinks.append(board)
            engine.log = stack.enter_context(BalanceLogger(sinks, options.log_interval, step=engine.updates))
        progress.say(f"{run.path}: {options.model}, {epochs - first} of {epochs} epochs, on {device}")
        if found is None:
            run.save(0, _state(engine, 0, None), 0, options.checkpoint_hist)
        try:
            for epoch in range(first, epochs):
                if stopped[0]:
                    raise Stopped
                best = _epoch(run, engine, loaders, collected, epoch, best)
        except Stopped:
            last = max(run.checkpoints())
            progress.say(f"stopped; {last} finished epochs are saved: the same command with --resume auto goes on")
            return Outcome(run.path, best, stopped[0])
        finally:
            if run.summary.exists():
                write_report(run.path)
            for line in skipped(run.bad_images):
                progress.say(f"skipped image: {line}")
    if best is not None:
        name = _metric(options)
        progress.say(f"best {name} {best[name]:.4g} in epoch {best['epoch'] + 1:.0f}: {run.student}")
    return Outcome(run.path, best)


def make_student(options: argparse.Namespace, classes: int | None) -> Any:
    """The student that the options name: a timm model.

    Raises:
        UsageError: timm has no such model, it refuses an option, or its weights cannot be loaded.
    """
    if not timm.is_model(options.model.split(":")[-1].split("/")[-1]) and ":" not in options.model:
        raise UsageError(f"--model: timm has no model {options.model!r}; timm.list_models('*part*') finds names")
    keywords = {
        "pretrained": options.pretrained,
        "num_classes": classes,
        "in_chans": options.in_chans,
        "drop_rate": options.drop,
        "drop_path_rate": options.drop_path,
        "img_size": options.img_size,
        **options.model_kwargs,
    }
    keywords = {key: value for key, value in keywords.items() if value is not None}
    try:
        try:
            student = timm.create_model(options.model, **keywords)
        except TypeError:
            if "img_size" not in keywords:
                raise
            del keywords["img_size"]  # a convolutional model takes any
            student = timm.create_model(options.model, **keywords)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"--model {options.model}, --model-kwargs {options.model_kwargs}: {error}") from error
    if options.initial_checkpoint:
        try:
            load_weights(student, options.initial_checkpoint)
        except FileNotFoundError:
            raise UsageError(f"--initial-checkpoint: there is no file {options.initial_checkpoint}") from None
        except RuntimeError as error:
            raise UsageError(
                f"--initial-checkpoint: {options.initial_checkpoint} does not fit {options.model}: {error}"
            ) from error
    if options.grad_checkpointing:
        student.set_grad_checkpointing(True)
    return student


def _make_task(
    options: argparse.Namespace,
    student: nn.Module,
    loaders: data.Data,
    device: torch.device,
    input_size: tuple[int, int, int],
) -> TrainingTask:
    """Raises UsageError: a teacher cannot be loaded, or does not fit the student."""
    try:
        task = build(options, student, _criterion(options, loaders), device=device, dtype=torch.float32)
        check_teachers(task, input_size)
        if loaders.keyed is not None:
            use_cache(task, options, loaders.keyed)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    return task


def _criterion(options: argparse.Namespace, loaders: data.Data) -> nn.Module:
    return create_classification_loss(
        loss_type="bce" if options.bce_loss else "ce",
        smoothing=options.smoothing,
        soft_targets=loaders.mixup is not None,
        bce_target_thresh=options.bce_target_thresh,
    )


def _compile(options: argparse.Namespace, task: TrainingTask) -> None:
    import torch._functorch.config

    # several backward passes read what one alone may overwrite
    torch._functorch.config.donated_buffer = options.kd_balance == "none"
    task.compile(backend=options.torchcompile, mode=options.torchcompile_mode)


def _tensorboard(run: RunDir, progress: Progress) -> TensorBoard | None:
    try:
        return TensorBoard(run.path / "tensorboard")
    except ImportError as error:
        progress.say(f"--log-tensorboard: {error}")
        return None


class _Collected:
    """An epoch's balanced steps."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def write(self, rows: Any, means: Any) -> None:
        """Keep them."""
        self.rows.extend(rows)

    def close(self) -> None:
        """Nothing."""

    def take(self) -> Row:
        """Their means; they are forgotten."""
        rows, self.rows = self.rows, []
        return {key: value for key, value in means_of(rows).items() if key != "step"} if rows else {}


def _epoch(
    run: RunDir,
    engine: Engine,
    loaders: data.Data,
    collected: _Collected,
    epoch: int,
    best: dict[str, float] | None,
) -> dict[str, float] | None:
    """Train, evaluate, and have it all on disk: the checkpoint last, so that it vouches for the rest."""
    options, task = engine.options, engine.task
    if loaders.mixup is not None and options.mixup_off_epoch and epoch >= options.mixup_off_epoch:
        loaders.train.mixup_enabled = False
    if loaders.keyed is not None:
        loaders.keyed.set_epoch(epoch)
    start, lr = time.monotonic(), engine.stepper.optimizer.param_groups[0]["lr"]
    losses = engine.train_epoch(loaders.train, epoch)
    for cache in getattr(task, "caches", ()):
        if cache is not None:
            cache.flush()
    if engine.log is not None:
        engine.log.flush()
    metrics: dict[str, float] = {}
    if loaders.validation is not None:
        metrics = engine.evaluate(loaders.validation)
        if task.has_ema():
            averaged = engine.evaluate(loaders.validation, ema=True)
            metrics |= {f"ema_{name}": value for name, value in averaged.items()}
    if engine.scheduler is not None:
        engine.scheduler.step(epoch + 1, metrics.get(_metric(options)))
    row = {"epoch": epoch} | {f"train_{name}": value for name, value in losses.items()}
    row |= {f"eval_{name}": value for name, value in metrics.items()}
    run.add_summary({**row, "lr": lr, **collected.take(), "seconds": round(time.monotonic() - start, 3)})
    if metrics:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        engine.progress.say(f"epoch {epoch + 1}/{engine.progress.epochs}  evaluation  {shown}")
    name = _metric(options)
    better = best is None or (metrics[name] < best[name] if name.endswith("loss") else metrics[name] > best[name])
    if metrics and better:
        best = {"epoch": epoch, **metrics}
        run.export(run.student, _student(task, ema=task.has_ema()))
    run.export(run.last_student, _student(task, ema=task.has_ema()))
    if not metrics:
        run.export(run.student, _student(task, ema=task.has_ema()))
    run.save(
        epoch + 1,
        _state(engine, epoch + 1, best),
        -1 if best is None else int(best["epoch"]) + 1,
        options.checkpoint_hist,
    )
    return best


def _metric(options: argparse.Namespace) -> str:
    """What the best epoch is chosen by: of the average, where there is one."""
    return f"ema_{options.eval_metric}" if options.model_ema else str(options.eval_metric)


def _student(task: TrainingTask, ema: bool) -> dict[str, Tensor]:
    """Without projector and teacher."""
    weights: dict[str, Tensor] = unwrap_model(task.get_eval_model(ema=ema)).state_dict()
    return weights


def _state(engine: Engine, epoch: int, best: dict[str, float] | None) -> dict[str, Any]:
    """All that the rest of the run depends on."""
    task, scheduler = engine.task, engine.scheduler
    state: dict[str, Any] = {
        "model": engine.options.model,
        "options": plain(engine.options),
        "epoch": epoch,
        "updates": engine.updates,
        "best": best,
        "weights": dict(unwrap_model(task.get_trainable_module()).state_dict()),
        "stepper": engine.stepper.state_dict(),
        "scheduler": None if scheduler is None else _scheduler_state(scheduler),
        "random": random_state(),
    }
    if task.has_ema():
        ema = task.get_trainable_module(ema=True)
        state["ema"] = {"weights": dict(ema.module.state_dict()), "random": ema._sr_generator.get_state()}
    return state


def _scheduler_state(scheduler: Any) -> dict[str, Any]:
    """Timm's schedulers are functions of the epoch; only the plateau's remembers, in torch's scheduler."""
    inner = getattr(scheduler, "lr_scheduler", None)
    if inner is None:
        return {"metric": scheduler.metric}
    return {key: value for key, value in vars(inner).items() if isinstance(value, (int, float, str, list))}


def _resume(
    engine: Engine, path: Path, state: dict[str, Any], progress: Progress
) -> tuple[int, dict[str, float] | None]:
    """Load a checkpoint into the run.

    Raises:
        UsageError: it is of another model or optimizer; nothing has changed then.
    """
    task, options = engine.task, engine.options
    module = unwrap_model(task.get_trainable_module())
    check_fits(path, state["weights"], module.state_dict(), options.model, state["model"])
    if task.has_ema() and "ema" not in state:
        raise UsageError(f"--resume: {path} holds no averaged weights; leave --model-ema out, or start anew")
    now = plain(options)
    for key, value in state["options"].items():
        if now.get(key) != value and key not in OUTSIDE:
            progress.say(f"--resume: {key} was {value!r}, is now {now.get(key)!r}")
    try:
        engine.stepper.load_state_dict(state["stepper"])
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"--resume: {path} was written with --opt {state['options'].get('opt')} --kd-balance "
            f"{state['options'].get('kd_balance')}, which does not fit: {error}; give these, or start anew"
        ) from error
    module.load_state_dict(state["weights"])
    if task.has_ema():
        ema = task.get_trainable_module(ema=True)
        ema.module.load_state_dict(state["ema"]["weights"])
        ema._sr_generator.set_state(state["ema"]["random"])
    if engine.scheduler is not None and state["scheduler"] is not None:
        vars(getattr(engine.scheduler, "lr_scheduler", engine.scheduler)).update(state["scheduler"])
    engine.updates = state["updates"]
    set_random_state(state["random"])
    progress.say(f"going on after epoch {state['epoch']} from {path}")
    return state["epoch"], state["best"]


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM is noted in the list, a second one ends the process as usual."""
    noted = [0]
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        noted[0] = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
