"""What the rest of a run depends on, and going on from there."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import random_seed, unwrap_model
from torch import Tensor, nn

from ..errors import UsageError
from ..monitor import Row
from .data import Data
from .engine import Engine
from .options import OUTSIDE, flag, plain
from .randomness import random_state, set_random_state

#: What a run's files mean depends on these: which epoch is the best, what the optimizer remembers, the random numbers.
FIXED = ("opt", "eval_metric", "model_ema", "val_split", "seed", "data_seed", "kd_held_out", "data_free")
#: Of the beginning; the checkpoint has what came of them.
FIRST = ("pretrained", "initial_checkpoint", "backbone_checkpoint")
#: Which samples are left of an epoch depends on these, how they look, and what its means are of; so do the options of
#: distillation and balance, whose names begin with kd_, and of images that are made, with df_.
OF_AN_EPOCH = (
    *("batch_size", "grad_accum_steps", "aug_repeats", "dataset", "train_split", "annotations", "class_map"),
    *("img_size", "input_size", "max_size", "square", "in_chans", "mean", "std"),
    *("task_loss_weight", "distill_loss_weight", "bce_loss", "bce_target_thresh", "smoothing"),
)
#: What torch's plateau schedule remembers; its other attributes are options.
_PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")


@dataclass(frozen=True)
class Position:
    """Where a run is.

    Attributes:
        epoch: finished epochs.
        best: the best epoch's evaluation.
        batches: of the next epoch that were used, on each rank.
        updates: steps before the next epoch.
        lr: at the beginning of the next epoch, where batches of it were used.
        means: of these batches' losses on this rank, for `Engine.train_epoch`.
        rows: of the log of these batches' steps, on the first rank.
        history: `rundir.chained` of the finished epochs' lines.
        students: `digest_of` each exported student, by its file's name.
    """

    epoch: int
    best: dict[str, float] | None = None
    batches: int = 0
    updates: int = 0
    lr: float = 0.0
    means: dict[str, Any] | None = field(default=None, repr=False)
    rows: Sequence[Row] = field(default=(), repr=False)
    history: str = ""
    students: Mapping[str, str] = field(default_factory=dict)


def told_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of each group of an optimizer that was just made: later some of them may be its memory."""
    plain_kinds = (bool, int, float, str, tuple, list, type(None))
    return [
        {key: value for key, value in group.items() if isinstance(value, plain_kinds) and "param" not in key}
        for group in optimizer.param_groups
    ]


def collect(engine: Engine, loaders: Data, at: Position) -> dict[str, Any]:
    """The state of a run, for `checkpoint.save_checkpoint`.

    All ranks call it; what it returns is whole on the first.
    """
    task, scheduler = engine.task, engine.scheduler
    own: dict[str, Any] = {"random": random_state(), "means": at.means}
    if at.batches and loaders.batches is not None:
        own["loader"] = loaders.batches.state_dict(at.batches)
        own["samples"], own["data"] = _samples(loaders), engine.data
    if engine.world.size > 1:
        # statistics of normalisation layers, which ranks may have of their own
        own["buffers"] = {name: _buffers(module) for name, module in modules(task).items()}
    state: dict[str, Any] = {
        "model": engine.options.model,
        "options": plain(engine.options),
        "names": engine.names,
        "epoch": at.epoch,
        "batches": at.batches,
        "updates": engine.updates,
        "updates_before": at.updates,
        "lr": at.lr,
        "best": at.best,
        "history": at.history,
        "students": dict(at.students),
        "groups": engine.groups,
        "per_epoch": engine.per_epoch,
        "ahead": engine.ahead,
        "rows": _table(at.rows),
        "weights": dict(unwrap_model(task.get_trainable_module()).state_dict()),
        "stepper": engine.stepper.state_dict(),
        "scheduler": None if scheduler is None else _scheduler_state(scheduler),
        "ranks": engine.world.gather(own),
    }
    if loaders.synthetic is not None:
        state["synthetic"] = loaders.synthetic.whole_state()
    if engine.lopsided is not None:
        state["lopsided"] = engine.lopsided.state_dict()
    if task.has_ema():
        ema: Any = task.get_trainable_module(ema=True)
        state["ema"] = {"weights": dict(ema.module.state_dict()), "random": ema._sr_generator.get_state()}
    return state


def _samples(loaders: Data) -> int:
    held: Any = loaders.batches
    return len(held.dataset)


def modules(task: TrainingTask) -> dict[str, nn.Module]:
    """What is trained, and its average if there is one."""
    found = {"weights": unwrap_model(task.get_trainable_module())}
    if task.has_ema():
        ema: Any = task.get_trainable_module(ema=True)
        found["ema"] = ema.module
    return found


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    # on the CPU: they go from process to process
    return {name: buffer.detach().cpu().clone() for name, buffer in module.named_buffers()}


def _table(rows: Sequence[Row]) -> dict[str, Any] | None:
    """As numbers, which take less room than text."""
    if not rows:
        return None
    return {
        "columns": list(rows[0]),
        "values": torch.tensor([list(row.values()) for row in rows], dtype=torch.float64),
    }


def _rows(table: dict[str, Any] | None) -> list[Row]:
    if table is None:
        return []
    return [dict(zip(table["columns"], values, strict=True)) for values in table["values"].tolist()]


def _scheduler_state(scheduler: Any) -> dict[str, Any]:
    """Timm's schedulers are functions of the epoch; only the plateau's remembers, in torch's scheduler."""
    inner = getattr(scheduler, "lr_scheduler", None)
    if inner is None:
        return {"metric": scheduler.metric}
    return {key: getattr(inner, key) for key in _PLATEAU}


def restore(engine: Engine, loaders: Data, path: Path, state: dict[str, Any]) -> Position:
    """Load a checkpoint into the run. No file changes.

    Options that have changed hold from the epoch on that begins; a line tells each of them.

    Raises:
        UsageError: it is of another model, optimizer or other classes, in the middle of an epoch of other ranks or
            batches, or an option has changed that must not. What is loaded is of no use then.
    """
    try:
        return _restore(engine, loaders, path, state)
    except UsageError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        told = ", ".join(_changes(state, engine.options)) or "none"
        raise UsageError(
            f"--resume: {path} does not fit this run: {reason}; changed options: {told}; give those it was written "
            "with, or another --experiment"
        ) from error


def _restore(engine: Engine, loaders: Data, path: Path, state: dict[str, Any]) -> Position:
    task, options, progress, world = engine.task, engine.options, engine.progress, engine.world
    module = unwrap_model(task.get_trainable_module())
    _check_model(path, state["weights"], module.state_dict(), options.model, state["model"])
    _check_names(path, state["names"], engine.names)
    _check_options(path, state, engine, loaders)
    for text in _changes(state, options):
        progress.say(f"--resume: {text}")
    engine.stepper.load_state_dict(state["stepper"])
    module.load_state_dict(state["weights"])
    if task.has_ema():
        ema: Any = task.get_trainable_module(ema=True)
        ema.module.load_state_dict(state["ema"]["weights"])
        ema._sr_generator.set_state(state["ema"]["random"])
    if engine.lopsided is not None and "lopsided" in state:
        engine.lopsided.load_state_dict(state["lopsided"])
    if loaders.synthetic is not None:
        loaders.synthetic.load_whole_state(state["synthetic"])
    engine.updates = state["updates"]
    _restore_options(engine, state)
    rows = _rows(state["rows"])
    at = Position(
        **{key: state[key] for key in ("epoch", "best", "batches", "lr", "history", "students")},
        updates=state["updates_before"],
        rows=rows,
    )
    if len(state["ranks"]) == world.size:
        at = _restore_rank(state["ranks"][world.rank], task, loaders, at)
    else:
        random_seed(options.seed + state["updates"], world.rank)
        progress.say(
            f"--resume: {path} was written by {len(state['ranks'])} processes, this run has {world.size}: the order "
            "of the samples and the random numbers are others"
        )
    where = f" and {at.batches} iterations" if at.batches else ""
    progress.say(f"going on after epoch {at.epoch}{where} from {path}")
    return at


def _changed(state: dict[str, Any], options: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """From the option to what it was and is, of those that change the results."""
    now = plain(options)
    return {
        key: (value, now[key])
        for key, value in state["options"].items()
        if key in now and now[key] != value and key not in OUTSIDE
    }


def _changes(state: dict[str, Any], options: argparse.Namespace) -> list[str]:
    none = ", which has no effect: the weights are the checkpoint's"
    return [
        f"{flag(key)} was {before!r}, is now {now!r}{none if key in FIRST else ''}"
        for key, (before, now) in _changed(state, options).items()
    ]


def _check_options(path: Path, state: dict[str, Any], engine: Engine, loaders: Data) -> None:
    options, ranks = engine.options, engine.world.size
    changed = _changed(state, options)
    for key in (key for key in FIXED if key in changed):
        before, now = changed[key]
        if key == "opt" and before.lower().removeprefix("dto") == now.lower().removeprefix("dto"):
            continue  # ours and the one it stands for have the same state
        raise UsageError(
            f"--resume: {path} was written with {flag(key)} {before}, this run has {flag(key)} {now}: it stays "
            f"the same for a whole run; give {flag(key)} {before}, or another --experiment"
        )
    if not state["batches"]:
        return
    middle = f"--resume: {path} is in the middle of an epoch"
    finished = "or pass one of the checkpoints epoch-*.safetensors"
    if loaders.batches is None or len(state["ranks"]) != ranks:
        raise UsageError(
            f"{middle} of {len(state['ranks'])} processes, this run has {ranks}; start as many, {finished}"
        )
    # a cache has an order of its own, in whatever folder it is
    moved = {"kd_cache_teacher"} if all(changed.get("kd_cache_teacher", ())) else set()
    for key in (key for key in changed if key in OF_AN_EPOCH or (key.startswith(("kd_", "df_")) and key not in moved)):
        raise UsageError(
            f"{middle} with {flag(key)} {changed[key][0]}, this run has {changed[key][1]}; give that, {finished}"
        )
    samples = state["ranks"][0]["samples"]
    if samples != _samples(loaders):
        raise UsageError(
            f"{middle} of {samples} samples, --data-dir now has {_samples(loaders)}: which of them "
            f"were seen is not known; pass one of the checkpoints epoch-*.safetensors"
        )
    before, now = state["ranks"][0].get("data"), engine.data
    if before is not None and now is not None and before != now:
        raise UsageError(
            f"{middle} of other training data than --data-dir now has (names, labels or contents have changed): which "
            "of it was seen is not known; restore it, or pass one of the checkpoints epoch-*.safetensors"
        )


def _check_names(path: Path, before: list[str] | None, now: list[str] | None) -> None:
    """Raises UsageError: a label does not mean the class that the student has learned. Classes may have no names."""
    if before is None or now is None or before == now:
        return
    label = next((i for i, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]), 0)
    raise UsageError(
        f"--resume: {path} has learned class {label} as {before[label]!r}, --data-dir or --annotations of this run has "
        f"{now[label]!r} there, so that labels would not mean the same; give the data (and --class-map) of that run, "
        "or start anew with another --experiment"
    )


def _check_model(path: Path, weights: dict[str, Tensor], own: dict[str, Tensor], model: str, saved_model: str) -> None:
    """Raises UsageError: names or shapes differ."""
    absent = [name for name in own if name not in weights]
    more = [name for name in weights if name not in own]
    shapes = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if not (absent or more or shapes):
        return
    name = (shapes or absent or more)[0]
    there = tuple(weights[name].shape) if name in weights else "nothing"
    expected = tuple(own[name].shape) if name in own else "nothing"
    raise UsageError(
        f"--resume: {path} is of another model ({saved_model}; this run trains {model}): {name} has {there}, expected "
        f"{expected}, and {len(absent) + len(more) + len(shapes) - 1} more differ; give the options of that run, or "
        "another --experiment"
    )


def _restore_options(engine: Engine, state: dict[str, Any]) -> None:
    """Give the optimizer's groups the options that have changed, and ask the schedule for where the run is.

    As timm's train.py does; what has not changed stays as it was loaded, as it may be the optimizer's memory.
    """
    groups, scheduler = engine.stepper.optimizer.param_groups, engine.scheduler
    before = engine.stepper.lr
    for group, then, now in zip(groups, state["groups"], engine.groups, strict=True):
        group.update({key: value for key, value in now.items() if key not in then or then[key] != value})
    epoch, updates = state["epoch"], state["updates"]
    in_epoch = updates - state["updates_before"] if state["batches"] else 0
    same = state["per_epoch"] == engine.per_epoch
    engine.ahead = state["ahead"] if same else epoch * engine.per_epoch + in_epoch - updates
    if scheduler is None and state["scheduler"] is not None:  # no schedule goes on at the end of another one
        for group, now in zip(groups, engine.groups, strict=True):
            group["lr"] = now["lr"]
    if scheduler is not None:
        for group, base in zip(groups, scheduler.base_values, strict=True):
            group["initial_lr"] = base
        _restore_schedule(scheduler, state["scheduler"] or {}, epoch, updates and updates + engine.ahead)
    if engine.stepper.lr != before:
        engine.progress.say(f"--resume: the learning rate goes on at {engine.stepper.lr:.6g}; it was {before:.6g}")


def _restore_schedule(scheduler: Any, held: dict[str, Any], epoch: int, updates: int) -> None:
    """Set the learning rate of the epoch that begins.

    Args:
        scheduler: timm's.
        held: of `_scheduler_state`; of another kind of schedule it does not count, nor does its last rate.
        epoch: finished ones.
        updates: steps, as the schedule counts them.
    """
    inner = getattr(scheduler, "lr_scheduler", None)
    if inner is None:
        if epoch > 0:
            scheduler.step(epoch)
        if updates > 0:
            scheduler.step_update(num_updates=updates)
        scheduler.metric = held.get("metric")
        return
    if held.keys() >= set(_PLATEAU):
        vars(inner).update({key: held[key] for key in _PLATEAU})
    else:
        scheduler.update_groups(scheduler.base_values)
    if scheduler.warmup_t and epoch <= scheduler.warmup_t:  # later it is what the evaluations have made of it
        scheduler.step(epoch)


def _restore_rank(own: dict[str, Any], task: TrainingTask, loaders: Data, at: Position) -> Position:
    for name, module in modules(task).items():
        held = dict(module.named_buffers())
        for key, value in own.get("buffers", {}).get(name, {}).items():
            held[key].copy_(value)
    set_random_state(own["random"])
    if at.batches and loaders.batches is not None:
        loaders.batches.go_on(own["loader"], at.batches, own["random"])
    return replace(at, means=own["means"])
