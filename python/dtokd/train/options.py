"""The options of `dtokd train`, named as timm's train.py names them. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..datafree import options as datafree
from ..objectives import options as objectives
from ..values import (
    ANY_NUMBER,
    BELOW_ONE,
    COUNT,
    FRACTION,
    LOOKING,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    KeyValues,
    Number,
    auto_augment,
    compile_backend,
    file_name,
    not_empty,
    path,
)

#: `--kd-balance`: timm's weighted sum, or a weighting of `dtokd_kernels.weighting` (a test compares the names).
BALANCES = (
    "none",
    "alignedmtl",
    "amortized",
    "auto",
    "cagrad",
    "config",
    "dto",
    "dualproj",
    "dwa",
    "eq18",
    "famo",
    "fixed",
    "heldout",
    "imtlg",
    "logsum",
    "mgda",
    "nashmtl",
    "pcgrad",
    "reachable",
    "rlw",
    "share",
    "taskfirst",
    "uncertainty",
    "upgrad",
    "whilebetter",
)
#: The share of the training images that is kept for those that look at held-out ones, by default.
HELD_OUT = 0.05
#: timm's and torch's own, which a test compares with theirs.
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau", "none")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("rrc", "rkrc", "rkrr")
ERASING_MODES = ("const", "rand", "pixel")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
#: The data directory without an option before it.
POSITIONAL = "data"
#: Options that have a default, and that a file may switch off with null.
NULLABLE = ("clip_grad", "lr")
#: What does not change a run's results, or only names it.
OUTSIDE = (
    *("config", "output", "experiment", "resume", "workers", "log_interval", "checkpoint_hist", "dist_timeout"),
    *("log_tensorboard", "log_wandb", "log_mlflow", "kd_eval_teacher", "baseline", "dry_run"),
)
#: What is no part of an experiment's name: these, and what may be another when the run goes on.
UNNAMED = (*OUTSIDE, "epochs", "device", "on_bad_image")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of `dtokd train`."""
    add_config(parser)
    add_data(parser)
    _add_model(parser)
    add_numerics(parser)
    add_optimization(parser)
    _add_augmentation(parser)
    objectives.add_arguments(parser)
    add_balance(parser)
    datafree.add_arguments(parser)
    add_ranks(parser)
    add_run(parser)


def add_config(parser: argparse.ArgumentParser) -> None:
    """The file of options."""
    parser.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help="YAML file of options, or a recipe, recipe:TABLE/PAIR/VARIANT; the command line overrides it",
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """Where images come from: also for `dtokd eval`."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add_positional(group)
    add("--data-dir", type=path, metavar="DIR", help="folder with a folder per split, each with a folder per class")
    add("--dataset", default="", metavar="NAME", help="data set as type/name, such as torch/cifar100")
    add("--train-split", type=not_empty, default="train", metavar="NAME", help="split to train on")
    add("--val-split", default="validation", metavar="NAME", help="split to evaluate on; '' for no evaluation")
    add("--dataset-download", action="store_true", help="download a torch/ data set")
    add("--class-map", default="", metavar="FILE", help="file of class names in the order of their indices")
    add_loading(group)


def add_positional(group: argparse._ArgumentGroup) -> None:
    """The data directory as timm's train.py takes it; `parse` makes it --data-dir."""
    group.add_argument(POSITIONAL, nargs="?", type=path, metavar="data-dir", help="the same as --data-dir, as in timm")


def add_loading(group: argparse._ArgumentGroup) -> None:
    """How images are read; also of `dtokd detect`."""
    add = group.add_argument
    add(
        "--on-bad-image",
        choices=["error", "skip"],
        default="skip",
        help="for an image that cannot be read: skip takes the next image instead, error ends the run",
    )
    add("-j", "--workers", type=NATURAL, default=4, metavar="N", help="processes that load images")
    add("-b", "--batch-size", type=COUNT, default=128, metavar="N", help="images per training batch")
    add(
        "-vb",
        "--validation-batch-size",
        type=COUNT,
        metavar="N",
        help="images per evaluation batch; default: --batch-size",
    )
    add("--pin-mem", action="store_true", help="pin the memory of batches on the host")
    add("--device", default="cuda", help="torch device; cuda falls back to cpu where torch has no GPU")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("student")
    add = group.add_argument
    add("--model", type=not_empty, default="resnet50", metavar="MODEL", help="name of a timm model")
    add("--pretrained", action="store_true", help="start with timm's weights")
    add("--initial-checkpoint", default="", metavar="FILE", help="file of weights to start with")
    add("--num-classes", type=COUNT, metavar="N", help="number of classes; default: those of the data")
    add("--img-size", type=COUNT, metavar="N", help="side of the images in pixels; default: the model's")
    add("--in-chans", type=COUNT, choices=[1, 3], help="channels of the images, grey or RGB; default: 3")
    add("--input-size", type=COUNT, nargs=3, metavar=("C", "H", "W"), help="size of the images; default: the model's")
    add(
        "--crop-pct",
        type=Number(float, above=0, most=1),
        metavar="X",
        help="part of an image that the evaluation crops; default: the model's",
    )
    add("--mean", type=ANY_NUMBER, nargs="+", metavar="X", help="mean of the pixels per channel; default: the model's")
    add(
        "--std",
        type=POSITIVE,
        nargs="+",
        metavar="X",
        help="standard deviation of the pixels per channel; default: the model's",
    )
    add(
        "--interpolation",
        choices=["", *INTERPOLATIONS],
        default="",
        help="how images are resized; default: the model's",
    )
    add("--drop", type=FRACTION, default=0.0, metavar="P", help="rate of dropout")
    add("--drop-path", type=FRACTION, metavar="P", help="rate of stochastic depth")
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="more arguments of the model")
    add(
        "--grad-checkpointing",
        action="store_true",
        help="compute activations again in the backward pass: less memory, more time",
    )
    add(
        "--torchcompile",
        nargs="?",
        const="inductor",
        type=compile_backend,
        metavar="BACKEND",
        help="compile the student with torch.compile",
    )
    add("--torchcompile-mode", choices=COMPILE_MODES, help="mode of torch.compile")


def add_numerics(parser: argparse.ArgumentParser) -> None:
    """Precision, memory format, and the average of the weights."""
    group = parser.add_argument_group("precision and average")
    add = group.add_argument
    add("--channels-last", action="store_true", help="keep images and weights in this memory format")
    add("--amp", action="store_true", help="automatic mixed precision")
    add("--amp-dtype", choices=["float16", "bfloat16"], default="float16", help="dtype of --amp")
    add("--model-ema", action="store_true", help="average the student's weights")
    add(
        "--model-ema-decay",
        type=FRACTION,
        default=0.9998,
        metavar="X",
        help="part of the average that stays in each step",
    )
    add("--model-ema-warmup", action="store_true", help="begin the average with a smaller decay")


def add_optimization(parser: argparse.ArgumentParser) -> None:
    """Optimizer, clipping, learning rate and its schedule."""
    group = parser.add_argument_group("optimization")
    add = group.add_argument
    add(
        "--opt",
        type=not_empty,
        default="sgd",
        metavar="NAME",
        help="optimizer: one of timm's, or dtoadamw or dtosgd, which balance and update in fused kernels",
    )
    add("--opt-eps", type=NOT_NEGATIVE, metavar="X", help="epsilon; default: the optimizer's")
    add("--opt-betas", type=BELOW_ONE, nargs="+", metavar="X", help="betas; default: the optimizer's")
    add("--momentum", type=FRACTION, default=0.9, metavar="X", help="momentum of SGD")
    add("--weight-decay", type=NOT_NEGATIVE, default=2e-5, metavar="X", help="weight decay")
    add(
        "--layer-decay",
        type=Number(float, above=0, most=1),
        metavar="X",
        help="factor of the learning rate from a layer to the one below",
    )
    add("--opt-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="more arguments of the optimizer")
    add("--clip-grad", type=POSITIVE, metavar="X", help="largest norm or value of the gradient: see --clip-mode")
    add("--clip-mode", choices=["norm", "value", "agc"], default="norm", help="what --clip-grad limits")
    add("--grad-accum-steps", type=COUNT, default=1, metavar="N", help="micro-batches per optimizer step")
    add("--lr", type=NOT_NEGATIVE, metavar="X", help="learning rate; default: --lr-base, scaled with the batch")
    add("--lr-base", type=POSITIVE, default=0.1, metavar="X", help="learning rate at a batch of --lr-base-size")
    add("--lr-base-size", type=COUNT, default=256, metavar="N", help="images in the batch that --lr-base is for")
    add(
        "--lr-base-scale",
        choices=["", "linear", "sqrt"],
        default="",
        help="how the learning rate without --lr grows with the batch of all processes; default: sqrt for adaptive "
        "optimizers, else linear",
    )
    add("--epochs", type=COUNT, default=300, metavar="N", help="length of the schedule")
    add("--sched", choices=SCHEDULES, default="cosine", help="schedule of the learning rate")
    add("--sched-on-updates", action="store_true", help="change the learning rate after each step, not each epoch")
    add("--warmup-lr", type=NOT_NEGATIVE, default=1e-5, metavar="X", help="learning rate at the start of the warm-up")
    add("--warmup-epochs", type=NATURAL, default=5, metavar="N", help="epochs of the warm-up")
    add("--warmup-prefix", action="store_true", help="the schedule begins after the warm-up")
    add("--min-lr", type=NOT_NEGATIVE, default=0.0, metavar="X", help="smallest learning rate of the schedule")
    add(
        "--cooldown-epochs",
        type=NATURAL,
        default=0,
        metavar="N",
        help="epochs at the smallest learning rate, after the schedule",
    )
    add("--decay-epochs", type=POSITIVE, default=90, metavar="N", help="epochs from one decay to the next (step)")
    add(
        "--decay-milestones",
        type=COUNT,
        nargs="+",
        default=[90, 180, 270],
        metavar="N",
        help="epochs of the decays (multistep)",
    )
    add("--decay-rate", type=POSITIVE, default=0.1, metavar="X", help="factor of a decay")


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation and loss")
    add = group.add_argument
    add("--no-aug", action="store_true", help="train without augmentation")
    add(
        "--train-crop-mode",
        choices=CROP_MODES,
        help="rrc: a random part at random aspect ratio; rkrc, rkrr: resized at nearly the image's own aspect ratio, "
        "then cropped in the centre, or at random (default: rrc)",
    )
    add(
        "--scale",
        type=POSITIVE,
        nargs=2,
        default=[0.08, 1.0],
        metavar=("MIN", "MAX"),
        help="part of the area that a random crop takes",
    )
    add(
        "--ratio",
        type=POSITIVE,
        nargs=2,
        default=[3 / 4, 4 / 3],
        metavar=("MIN", "MAX"),
        help="aspect ratio of a random crop",
    )
    add("--hflip", type=FRACTION, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--vflip", type=FRACTION, default=0.0, metavar="P", help="probability of a vertical flip")
    add("--color-jitter", type=NOT_NEGATIVE, default=0.4, metavar="X", help="strength of the color jitter")
    add("--aa", type=auto_augment, metavar="NAME", help="policy of AutoAugment or RandAugment")
    add(
        "--aug-repeats",
        type=Number(float, least=0, most=1000),
        default=0,
        metavar="N",
        help="take each image N times with other augmentations; an epoch then sees one image in N",
    )
    add(
        "--train-interpolation",
        choices=["random", *INTERPOLATIONS],
        default="random",
        help="how training images are resized",
    )
    add("--reprob", type=FRACTION, default=0.0, metavar="P", help="probability of random erasing")
    add("--remode", choices=ERASING_MODES, default="pixel", help="what fills an erased part")
    add("--recount", type=COUNT, default=1, metavar="N", help="parts that are erased in an image")
    add("--mixup", type=NOT_NEGATIVE, default=0.0, metavar="X", help="alpha of mixup; 0 switches it off")
    add("--cutmix", type=NOT_NEGATIVE, default=0.0, metavar="X", help="alpha of CutMix; 0 switches it off")
    add(
        "--cutmix-minmax",
        type=FRACTION,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="range of the size of a CutMix part; replaces --cutmix",
    )
    add("--mixup-prob", type=FRACTION, default=1.0, metavar="P", help="probability of mixup or CutMix in a batch")
    add("--mixup-switch-prob", type=FRACTION, default=0.5, metavar="P", help="probability of CutMix where both are on")
    add("--mixup-mode", choices=["batch", "pair", "elem"], default="batch", help="what shares one mixing ratio")
    add(
        "--mixup-off-epoch",
        type=NATURAL,
        default=0,
        metavar="N",
        help="epoch after which nothing is mixed; 0: no such epoch",
    )
    add("--smoothing", type=BELOW_ONE, default=0.1, metavar="X", help="label smoothing")
    add("--bce-loss", action="store_true", help="binary cross-entropy in place of cross-entropy")
    add(
        "--bce-target-thresh",
        type=FRACTION,
        metavar="X",
        help="with --bce-loss: targets above it count as 1, others as 0",
    )


def add_balance(parser: argparse.ArgumentParser) -> None:
    """How the objectives' gradients are combined."""
    group = parser.add_argument_group("balance", "how the objectives' gradients are combined")
    add = group.add_argument
    add(
        "--kd-balance",
        choices=BALANCES,
        default="none",
        metavar="NAME",
        help=f"none: timm's weighted sum of the losses; or a weighting: {', '.join(BALANCES[1:])}. Recommended: "
        "whilebetter if the teacher has the student's classes, famo if it has others and is known to be good",
    )
    add(
        "--kd-balance-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="K=V",
        help="options of the weighting, such as c=0.4 for cagrad",
    )
    add(
        "--kd-balance-gram",
        metavar="SOURCE",
        help="how the inner products of the gradients are measured: exact, overlap, lag, probe[:MODULES], "
        "feature:MODULE, every:N[:SOURCE], ema:B[:SOURCE]; default: exact, if the weighting needs them",
    )
    add(
        "--kd-held-out",
        type=Number(float, least=0, most=0.5),
        metavar="SHARE",
        help=f"share of the training images that is held out, for --kd-balance {', '.join(LOOKING)}; "
        f"default: {HELD_OUT} for these, else 0",
    )
    add(
        "--kd-held-out-every",
        type=Number(int, least=1),
        default=20,
        metavar="N",
        help="steps from one measurement on a held-out batch to the next; each costs a forward pass and, with K "
        "losses, K + 1 backward passes, or a forward pass of student and teacher (whilebetter)",
    )
    add(
        "--kd-balance-params",
        choices=["shared", "all"],
        default="shared",
        help="what is balanced. shared: the parameters that all objectives reach; all: heads and projectors too",
    )
    add(
        "--kd-balance-rescale",
        choices=["none", "sum"],
        help="none: the paper's scale 1/L; sum: the scale of a weighted sum; default: none with Adam-like optimizers "
        "and for weightings of raw gradients, else sum",
    )


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """How the processes that torchrun starts train one model."""
    group = parser.add_argument_group(
        "several processes", "start them with torchrun; --batch-size is that of each process"
    )
    add = group.add_argument
    add("--kd-shard", action="store_true", help="each process keeps a part of the optimizer's state (dtoadamw, dtosgd)")
    add("--sync-bn", action="store_true", help="batch normalization over all processes, on GPUs")
    add(
        "--dist-bn",
        choices=["reduce", "broadcast", ""],
        default="reduce",
        help="statistics of batch normalization after each epoch: averaged, those of the first, or each its own",
    )
    add("--no-ddp-bb", action="store_true", help="no broadcast of buffers before each forward pass")
    add(
        "--dist-timeout",
        type=Number(float, above=0, most=1e9),
        default=600,
        metavar="SECONDS",
        help="how long processes wait for each other",
    )


def add_run(
    parser: argparse.ArgumentParser, metrics: Sequence[str] = ("top1", "top5", "loss")
) -> argparse._ArgumentGroup:
    """Where a run goes, how it goes on, and which of the metrics is best; the first is the default. Their group."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--seed", type=NATURAL, default=42, metavar="N", help="seed of the run")
    add(
        "--data-seed",
        type=NATURAL,
        metavar="N",
        help="seed of each epoch's order and augmentation of images, and of dropout, so that they do not depend on the "
        "teacher and the heads; default: they follow from --seed, as in timm",
    )
    add("--output", type=path, default=Path("output/train"), metavar="DIR", help="directory of runs")
    add(
        "--experiment",
        type=file_name,
        default="",
        metavar="NAME",
        help="folder in --output; default: made of the options",
    )
    add("--resume", default="", metavar="auto|FILE", help="continue from the newest checkpoint, or from this one")
    add("--checkpoint-hist", type=COUNT, default=10, metavar="N", help="number of checkpoints to keep")
    add("--eval-metric", choices=list(metrics), default=metrics[0], help="metric that the best epoch is chosen by")
    add("--log-interval", type=COUNT, default=50, metavar="N", help="iterations from one printed line to the next")
    add("--log-tensorboard", action=argparse.BooleanOptionalAction, default=True, help="write TensorBoard's files")
    add("--log-wandb", action="store_true", help="log to Weights & Biases too; the project is named like --output")
    add("--log-mlflow", action="store_true", help="log to MLflow too; the experiment is named like --output")
    add(
        "--kd-eval-teacher",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the teacher on the validation split before training, and warn if it is no better than chance",
    )
    add("--baseline", type=path, metavar="RUN", help="a run of the same student without a teacher, for the report")
    add(
        "--dry-run",
        action="store_true",
        help="check data and options, train some iterations, print memory and time per epoch, and write nothing",
    )
    return group


def flag(name: str) -> str:
    """An option as it is written."""
    return f"--{name.replace('_', '-')}"


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """The options as YAML and JSON can hold them."""
    values = {key: value for key, value in vars(options).items() if key != "config"}
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def experiment_name(options: argparse.Namespace) -> str:
    """The same for the same command, also on another device and with more epochs: `--resume auto` finds its run."""
    told = {key: value for key, value in plain(options).items() if key not in UNNAMED}
    if told.get("data_free") is None:
        told = {key: value for key, value in told.items() if not datafree.is_own(key)}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    return f"{options.model.replace('/', '_')}-{options.kd_balance}-{digest}"
