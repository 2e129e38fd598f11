"""The arguments of distillation. No timm or torch is imported here: --help should not wait for them."""

from __future__ import annotations

import argparse

from ..values import ANY_INT, COUNT, NATURAL, NOT_NEGATIVE, POSITIVE, KeyValues, not_empty, path

#: What a student can imitate, and the name of the objective in logs.
DISTILL_TYPES = {
    "logit": "kl",
    "feature": "feature",
    "token": "token",
    "multiscale": "multiscale",
    "attention": "attention",
    "review": "review",
    "dkd": "dkd",
    "logit-std": "kl_std",
    "dist": "dist",
    "rkd": "rkd",
    "crd": "crd",
    "pseudo-class": "pseudo_class",
}
#: Values of --kd-teacher-img-size besides a number.
SIZES = ("own", "student")


def teacher_size(text: str) -> int | str:
    """The `type` of --kd-teacher-img-size.

    Raises:
        argparse.ArgumentTypeError: it is neither of `SIZES` nor a number of pixels.
    """
    if text in SIZES:
        return text
    try:
        return int(COUNT(text))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of pixels, own or student") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "knowledge distillation". Options that timm's train.py has too bear its names and defaults."""
    group = parser.add_argument_group("knowledge distillation")
    add = group.add_argument
    add(
        "--kd-model-name",
        type=not_empty,
        nargs="+",
        metavar="NAME",
        help="timm model that teaches; of several teachers each gives objectives of its own",
    )
    add(
        "--kd-teacher-path",
        type=not_empty,
        nargs="+",
        metavar="FILE",
        help="weights of each teacher (.safetensors, or a torch file without pickled code), or a run directory of "
        "dtokd train, which also holds its model, size and normalisation; default: pretrained, which stands for timm's "
        "own weights",
    )
    add(
        "--kd-model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="K=V",
        help="more arguments of each teacher's model",
    )
    add(
        "--kd-distill-type",
        nargs="+",
        choices=list(DISTILL_TYPES),
        default=["logit"],
        metavar="TYPE",
        help=f"what the student imitates, each type as an objective of its own: {', '.join(DISTILL_TYPES)}",
    )
    add_weights(group)
    add(
        "--kd-temperature",
        type=POSITIVE,
        default=4.0,
        metavar="T",
        help="temperature of the softmax of logit, logit-std, token (soft), dkd and dist",
    )
    add(
        "--kd-token-distill-type",
        choices=["soft", "hard"],
        default="soft",
        help="loss of token. soft: KL divergence; hard: cross-entropy with the class that the teacher predicts",
    )
    add(
        "--kd-student-feature-dim",
        type=COUNT,
        metavar="N",
        help="width of the student's pooled features (default: the model's)",
    )
    add(
        "--kd-teacher-feature-dim",
        type=COUNT,
        metavar="N",
        help="width of the teacher's pooled features (default: the model's)",
    )
    add_projection(group)
    add(
        "--kd-feature-pool",
        choices=["head", "mean"],
        default="head",
        help="how features are pooled. head: the input of the classifier; mean: over the positions of the map, or the "
        "patch tokens",
    )
    add(
        "--kd-stages",
        type=COUNT,
        default=3,
        metavar="N",
        help="number of stages that multiscale, attention and review compare: the last ones of a CNN, blocks at equal "
        "distance of a transformer",
    )
    add_stages(group)
    add(
        "--kd-review-width",
        type=COUNT,
        metavar="N",
        help="channels in which review fuses stages (default: those of the student's deepest stage, at most 512)",
    )
    for part, default, classes in (("alpha", 1.0, "target class"), ("beta", 8.0, "other classes")):
        add(
            f"--kd-dkd-{part}",
            type=NOT_NEGATIVE,
            default=default,
            metavar="X",
            help=f"dkd: weight of the part of the {classes}",
        )
    add(
        "--kd-contrast-temperature",
        type=POSITIVE,
        default=0.07,
        metavar="X",
        help="temperature of crd and pseudo-class: cosines are divided by it",
    )
    add(
        "--kd-queue-size",
        type=COUNT,
        default=2048,
        metavar="N",
        help="pseudo-class: number of images whose features are kept; take at most half of the training images",
    )
    add_teacher(group)
    add_cache(
        group,
        "logits and pooled features; no feature maps",
        "classes of each image, the most probable ones; the others share the remaining probability evenly",
    )


def add_cache(group: argparse._ArgumentGroup, outputs: str, kept: str) -> None:
    """Teachers' outputs on disk; also of `dtokd detect`.

    Args:
        group: of the parser.
        outputs: what can be stored.
        kept: what --kd-cache-topk counts.
    """
    add = group.add_argument
    add(
        "--kd-cache-teacher",
        type=path,
        metavar="DIR",
        help=f"folder that keeps the teacher's outputs, so that it runs once for each augmented image: {outputs}",
    )
    add(
        "--kd-cache-views",
        type=NATURAL,
        default=1,
        metavar="N",
        help="with the cache: number of augmentations of each image, used by the epochs in turn; 0: another one in "
        "each epoch, which saves time in later runs alone",
    )
    add("--kd-cache-topk", type=COUNT, metavar="K", help=f"with the cache: keep K {kept} (default: all)")
    add(
        "--kd-cache-dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32",
        help="with the cache: dtype in which outputs are kept; float32 loses nothing",
    )


def add_stages(group: argparse._ArgumentGroup) -> None:
    """Which maps are compared; also of `dtokd detect`."""
    for who in ("student", "teacher"):
        group.add_argument(
            f"--kd-{who}-stages",
            type=ANY_INT,
            nargs="+",
            metavar="INDEX",
            help=f"compare the {who}'s feature maps with these numbers (from 0), in place of the default ones",
        )


def add_teacher(group: argparse._ArgumentGroup) -> None:
    """How a timm model is read as teacher; also of `dtokd detect`."""
    add = group.add_argument
    add(
        "--kd-teacher-img-size",
        type=teacher_size,
        metavar="N|own|student",
        help="size of a timm teacher's images: N pixels, its own training size, or the student's size rounded to "
        "whole patches; default: own if the model takes no other size, in dtokd train also for a transformer of which "
        "only features are read; else student",
    )
    add(
        "--kd-teacher-dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of a timm teacher's weights and forward pass, outside autocast (default: the student's, under its "
        "autocast)",
    )
    add("--kd-teacher-compile", action="store_true", help="compile a timm teacher with torch.compile")


def add_weights(group: argparse._ArgumentGroup) -> None:
    """Weights of the objectives in the sum; also of `dtokd detect`."""
    add = group.add_argument
    add(
        "--task-loss-weight",
        type=NOT_NEGATIVE,
        metavar="W",
        help="weight of the task loss, for --kd-balance none and fixed (default: 1)",
    )
    add(
        "--distill-loss-weight",
        type=NOT_NEGATIVE,
        nargs="+",
        metavar="W",
        help="weight of the distillation objectives, for --kd-balance none and fixed: one for all, or one each; "
        "default: 1 each, but if --task-loss-weight W is given they share 1 - W",
    )


def add_projection(group: argparse._ArgumentGroup) -> None:
    """How features are compared; also of `dtokd detect`."""
    add = group.add_argument
    add(
        "--kd-projector",
        choices=["linear", "orthogonal"],
        default="linear",
        help="projection of the student's features to the teacher's width; linear: left out if the widths agree, as in "
        "timm",
    )
    add(
        "--kd-feature-norm",
        choices=["none", "layernorm", "standardize", "phi-s"],
        default="none",
        help="how features are normalised. layernorm: the teacher's features, over channels; standardize: teacher's "
        "and student's, per channel over the batch; phi-s: the teacher's, by PHI standardisation, which makes several "
        "teachers comparable",
    )
    add(
        "--kd-statistics-batches",
        type=COUNT,
        default=32,
        metavar="N",
        help="phi-s: take the statistics of the first N batches of all processes, before the first step",
    )
    add(
        "--kd-feature-loss",
        choices=["mse", "smooth_l1", "cosine", "norm"],
        default="mse",
        help="distance between features; norm: the mean, over positions, of the L2 norm of the difference",
    )
