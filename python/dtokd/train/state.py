"""What the rest of a run depends on, and going on from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import random_seed, unwrap_model
from torch import Tensor, nn

from ..errors import UsageError
from ..monitor import Row
from .checkpoint import check_fits
from .data import Data
from .engine import Engine
from .options import OUTSIDE, plain
from .randomness import random_state, set_random_state


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
    """

    epoch: int
    best: dict[str, float] | None = None
    batches: int = 0
    updates: int = 0
    lr: float = 0.0
    means: dict[str, Any] | None = field(default=None, repr=False)
    rows: Sequence[Row] = field(default=(), repr=False)


def collect(engine: Engine, loaders: Data, at: Position) -> dict[str, Any]:
    """The state of a run, for `checkpoint.save_checkpoint`.

    All ranks call it; what it returns is whole on the first.
    """
    task, scheduler = engine.task, engine.scheduler
    own = {"random": random_state(), "means": at.means}
    if at.batches and loaders.batches is not None:
        own["loader"] = loaders.batches.state_dict(at.batches)
    if engine.world.size > 1:
        # statistics of normalisation layers, which ranks may have of their own
        own["buffers"] = {name: _buffers(module) for name, module in modules(task).items()}
    state: dict[str, Any] = {
        "model": engine.options.model,
        "options": plain(engine.options),
        "epoch": at.epoch,
        "batches": at.batches,
        "updates": engine.updates,
        "updates_before": at.updates,
        "lr": at.lr,
        "best": at.best,
        "rows": _table(at.rows),
        "weights": dict(unwrap_model(task.get_trainable_module()).state_dict()),
        "stepper": engine.stepper.state_dict(),
        "scheduler": None if scheduler is None else _scheduler_state(scheduler),
        "ranks": engine.world.gather(own),
    }
    if task.has_ema():
        ema: Any = task.get_trainable_module(ema=True)
        state["ema"] = {"weights": dict(ema.module.state_dict()), "random": ema._sr_generator.get_state()}
    return state


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
    return {key: value for key, value in vars(inner).items() if isinstance(value, (int, float, str, list))}


def restore(engine: Engine, loaders: Data, path: Path, state: dict[str, Any]) -> Position:
    """Load a checkpoint into the run.

    Raises:
        UsageError: it is of another model or optimizer, or in the middle of an epoch of other ranks; nothing has
            changed then.
    """
    task, options, progress, world = engine.task, engine.options, engine.progress, engine.world
    module = unwrap_model(task.get_trainable_module())
    check_fits(path, state["weights"], module.state_dict(), options.model, state["model"])
    if task.has_ema() and "ema" not in state:
        raise UsageError(f"--resume: {path} holds no averaged weights; leave --model-ema out, or start anew")
    same_ranks = len(state["ranks"]) == world.size
    if state["batches"] and not (same_ranks and loaders.batches is not None):
        raise UsageError(
            f"--resume: {path} is in the middle of an epoch of {len(state['ranks'])} processes, this run has "
            f"{world.size}; start as many, or pass one of the checkpoints epoch-*.safetensors"
        )
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
        ema: Any = task.get_trainable_module(ema=True)
        ema.module.load_state_dict(state["ema"]["weights"])
        ema._sr_generator.set_state(state["ema"]["random"])
    if engine.scheduler is not None and state["scheduler"] is not None:
        vars(getattr(engine.scheduler, "lr_scheduler", engine.scheduler)).update(state["scheduler"])
    engine.updates = state["updates"]
    rows = _rows(state["rows"])
    at = Position(state["epoch"], state["best"], state["batches"], state["updates_before"], state["lr"], rows=rows)
    if same_ranks:
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


def _restore_rank(own: dict[str, Any], task: TrainingTask, loaders: Data, at: Position) -> Position:
    for name, module in modules(task).items():
        held = dict(module.named_buffers())
        for key, value in own.get("buffers", {}).get(name, {}).items():
            held[key].copy_(value)
    set_random_state(own["random"])
    if at.batches and loaders.batches is not None:
        loaders.batches.go_on(own["loader"], at.batches, own["random"])
    return replace(at, means=own["means"])
