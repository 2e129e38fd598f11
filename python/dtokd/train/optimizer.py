"""From the options to an optimizer and the way it steps."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtokd_kernels import sources, weighting
from dtokd_kernels.balanced import Balanced
from dtokd_kernels.sources import Source
from dtokd_kernels.types import Rescale

from .. import timm_optim  # noqa: F401  registers dtoadamw and dtosgd
from ..errors import UsageError
from . import heldout
from .options import flag
from .steps import Averaged, Filled, Fused, Stepper, clipping
from .world import World

#: How timm and torch refuse an optimizer's arguments.
_REFUSALS = (TypeError, ValueError, AssertionError, IndexError, KeyError, AttributeError, RuntimeError)


def learning_rate(options: argparse.Namespace, ranks: int = 1) -> float:
    """--lr, or --lr-base scaled with the batch of all ranks as timm's train.py scales it."""
    if options.lr is not None:
        return float(options.lr)
    ratio = ranks * options.batch_size * options.grad_accum_steps / options.lr_base_size
    scale = options.lr_base_scale
    if not scale:
        adaptive = any(name in options.opt.lower() for name in ("ada", "lamb", "lion"))
        scale = "sqrt" if adaptive else "linear"
    return float(options.lr_base * (ratio**0.5 if scale == "sqrt" else ratio))


def make_stepper(
    options: argparse.Namespace, task: TrainingTask, device: torch.device, world: World | None = None
) -> Stepper:
    """The optimizer over timm's parameter groups of the task's trainable module, and its step.

    Args:
        options: of `train.options`.
        task: student, teacher, losses.
        device: of the student.
        world: the processes that train together; default: this one alone.

    Raises:
        UsageError: an unknown optimizer or option, or two that do not go together.
    """
    check(options)
    ours, balanced = _is_ours(options), options.kd_balance != "none"
    world = world or World()
    _check_ranks(options, ours, device, world)
    lr = learning_rate(options, world.size)
    keywords = {**optimizer_kwargs(argparse.Namespace(**{**vars(options), "lr": lr}))}
    keywords |= options.opt_kwargs
    balancing = _balancing(options, task) if balanced else {}
    if ours:
        keywords |= balancing | {"max_norm": options.clip_grad}
    try:
        optimizer = create_optimizer_v2(task.get_trainable_module(), **keywords)
    except _REFUSALS as error:
        given = [
            f"{flag(name)} {value}"
            for name in ("opt_betas", "opt_eps", "layer_decay", "opt_kwargs")
            if (value := getattr(options, name))
        ]
        raise UsageError(f"{', '.join([f'--opt {options.opt}', *given])}: {error}") from error
    if options.sched == "none":  # the other schedules of timm decay by layers themselves
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp and options.amp_dtype == "float16")
    if isinstance(optimizer, Balanced):
        return Fused(optimizer, scaler)
    clip = clipping(options.clip_grad, options.clip_mode, task.get_clip_parameters("agc" in options.clip_mode))
    if not balanced:
        return Stepper(optimizer, scaler, clip)
    return Filled(optimizer, scaler, clip, **balancing)


def _is_ours(options: argparse.Namespace) -> bool:
    return options.opt.lower().split("_")[-1] in ("dtoadamw", "dtosgd")


def check(options: argparse.Namespace) -> None:
    """Check optimizer and balance as far as that needs no model.

    Raises:
        UsageError: there is no such optimizer, or two options do not go together.
    """
    ours, balanced = _is_ours(options), options.kd_balance != "none"
    heldout.check(options)
    prefix, _, name = options.opt.lower().rpartition("_")
    if name not in list_optimizers() or prefix not in ("", "lookahead"):  # timm would read the last part alone
        raise UsageError(f"--opt: no optimizer is called {options.opt!r}; choose dtoadamw, dtosgd, or one of timm's")
    if ours and prefix:
        raise UsageError(
            f"--opt: {options.opt}, but timm's Lookahead looks at the gradients in .grad, which {name} does not leave "
            f"there; choose {name}, or lookahead_{name.removeprefix('dto')} with --kd-balance, which fills them"
        )
    if balanced and not options.kd_model_name:
        raise UsageError(
            f"--kd-balance: {options.kd_balance}, but without a teacher there is one objective; pass --kd-model-name"
        )
    if ours and not balanced:
        raise UsageError(
            f"--opt: {options.opt} balances several objectives; choose --kd-balance, such as whilebetter, or --opt "
            f"{options.opt.lower().removeprefix('dto')}"
        )
    if ours and options.clip_mode != "norm" and options.clip_grad is not None:
        raise UsageError(
            f"--clip-mode: {options.clip_mode}, but {options.opt} clips by norm only; choose another --opt"
        )
    for name in ("gram", "kwargs", "rescale"):
        if not balanced and getattr(options, f"kd_balance_{name}"):
            raise UsageError(f"--kd-balance-{name}: nothing is balanced; choose --kd-balance too")


def _check_ranks(options: argparse.Namespace, ours: bool, device: torch.device, world: World) -> None:
    shard = getattr(options, "kd_shard", False)
    if shard and not ours:
        raise UsageError(
            f"--kd-shard: --opt {options.opt} has a state of its own on each rank; choose dtoadamw or dtosgd and a "
            "--kd-balance, or leave --kd-shard out"
        )
    if not world.joined:
        if shard:
            raise UsageError("--kd-shard: there is one process; start several with torchrun, or leave it out")
        return
    if options.sync_bn and device.type == "cpu":
        raise UsageError("--sync-bn: torch has it on GPUs only; leave it out, or keep --dist-bn reduce")


def distribute(task: TrainingTask, stepper: Stepper, options: argparse.Namespace, device: torch.device) -> None:
    """Wrap what is trained in DistributedDataParallel, and have a balance average over the ranks. All of them call it.

    Raises:
        UsageError: what the optimizer cannot do over ranks.
    """
    if options.sync_bn:
        task.trainable_module = convert_sync_batchnorm(task.get_trainable_module())
    keywords = {}
    if options.no_ddp_bb:  # torch 2.14 has another name for it
        names = inspect.signature(DistributedDataParallel).parameters
        keywords["forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"] = False
    task.prepare_distributed([device.index] if device.type == "cuda" else None, **keywords)
    if isinstance(stepper, Averaged):
        try:
            stepper.attach(task.get_trainable_module(), options.kd_shard)
        except ValueError as error:
            raise UsageError(f"--kd-shard: {error}") from error


def _balancing(options: argparse.Namespace, task: TrainingTask) -> dict[str, Any]:
    """weighting, gram, private, rescale: as the optimizers and `backward` take them."""
    keywords = dict(options.kd_balance_kwargs)
    if options.kd_balance == "fixed" and "weights" not in keywords:
        keywords["weights"] = (task.task_loss_weight, *task.distill_loss_weights.values())
    try:
        rule = weighting.from_name(options.kd_balance, **keywords)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--kd-balance {options.kd_balance}, --kd-balance-kwargs {keywords}: {error}") from error
    # SGD feels 1 / L as a learning rate, Adam does not; raw gradients keep their scale
    keeps = "adam" in options.opt.lower() or not getattr(rule, "log_gradients", True)
    rescale: Rescale = options.kd_balance_rescale or ("none" if keeps else "sum")
    student = unwrap_model(task.get_eval_model())
    gram = None if options.kd_balance_gram is None else parse_source(options.kd_balance_gram, student)
    return {
        "weighting": rule,
        "gram": gram,
        "private": "own" if options.kd_balance_params == "shared" else "balanced",
        "rescale": rescale,
    }


def parse_source(text: str, student: nn.Module) -> Source:
    """A source of the Gram matrix from its text.

    Args:
        text: exact, overlap, lag, probe[:MODULES], feature:MODULE, every:N[:SOURCE] or ema:B[:SOURCE]; modules by
            their names in the student, separated by commas.
        student: whose modules are named.

    Raises:
        UsageError: it is none of these.

    Example:
        >>> parse_source("every:10:overlap", nn.Linear(1, 1))
        Every(n=10, source=Overlap())
    """
    name, _, rest = text.partition(":")
    try:
        if name in ("exact", "overlap", "lag") and not rest:
            return {"exact": sources.Exact, "overlap": sources.Overlap, "lag": sources.Lag}[name]()
        if name == "probe":
            return sources.Probe([_module(student, part) for part in rest.split(",")] if rest else None)
        if name == "feature" and rest:
            return sources.Feature(_module(student, rest))
        if name in ("every", "ema") and rest:
            number, _, inner = rest.partition(":")
            source: Any = parse_source(inner, student) if inner else "exact"
            return sources.Every(int(number), source) if name == "every" else sources.Ema(float(number), source)
    except (TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"--kd-balance-gram: {text!r}: {error}") from error
    raise UsageError(
        f"--kd-balance-gram: {text!r}; choose exact, overlap, lag, probe[:MODULES], feature:MODULE, every:N[:SOURCE] "
        "or ema:B[:SOURCE]"
    )


def _module(student: nn.Module, name: str) -> nn.Module:
    try:
        return student.get_submodule(name)
    except AttributeError:
        top = ", ".join(child for child, _ in student.named_children())
        raise UsageError(f"--kd-balance-gram: the student has no module {name!r}; the outermost are {top}") from None
