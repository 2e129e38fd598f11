"""The options of `dtokd detect`; those of optimizer, balance and run are `dtokd train`'s. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..train import options as shared
from ..values import COUNT, FRACTION, NATURAL, NOT_NEGATIVE, KeyValues, not_empty, path

DISTILL_TYPES = ("token", "feature", "prediction")
#: What the best epoch is chosen by.
METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
#: What differs from `dtokd train`.
DEFAULTS = {
    "opt": "adamw",
    "lr": 1e-4,
    "weight_decay": 1e-4,
    "epochs": 50,
    "clip_grad": 0.1,
    "warmup_epochs": 0,
    "batch_size": 2,
    "output": Path("output/detect"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of `dtokd detect`."""
    shared.add_config(parser)
    _add_data(parser)
    _add_student(parser)
    shared.add_numerics(parser)
    shared.add_optimization(parser)
    _add_distillation(parser)
    shared.add_balance(parser)
    shared.add_ranks(parser)
    run = shared.add_run(parser, METRICS)
    run.add_argument(
        "--pictures", type=NATURAL, default=12, metavar="N", help="images of the validation split that the report shows"
    )
    demo = parser.add_argument_group("demo", "uses --output, --seed and --epochs; all other options are set by it")
    demo.add_argument(
        "--demo", action="store_true", help="show what distillation does on scenes of real digits, in minutes"
    )
    parser.set_defaults(**DEFAULTS)
    rate = next(action for action in parser._actions if action.dest == "lr")
    rate.help = "learning rate, not scaled with the batch"


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    shared.add_positional(group)
    add = group.add_argument
    add(
        "--data-dir",
        type=path,
        metavar="DIR",
        help="folder with a folder of images per split, and with the annotations",
    )
    add(
        "--annotations",
        default="annotations/instances_{split}.json",
        metavar="PATTERN",
        help="files in COCO's JSON format in --data-dir; {split} stands for the split's name",
    )
    add("--train-split", type=not_empty, default="train2017", metavar="NAME", help="split to train on")
    add("--val-split", default="val2017", metavar="NAME", help="split to evaluate on; '' for no evaluation")
    shared.add_loading(group)
    add("--img-size", type=COUNT, default=800, metavar="N", help="shorter side of the images")
    add("--max-size", type=COUNT, default=1333, metavar="N", help="longer side at most")
    add("--square", action="store_true", help="resize to img-size x img-size, without padding, as RT-DETR has it")
    add(
        "--scales",
        type=COUNT,
        nargs="+",
        metavar="N",
        help="shorter sides; each training image gets one of them at random",
    )
    add("--crop", action="store_true", help="crop half of the training images at random, as DETR and ViDT do")
    add("--hflip", type=FRACTION, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--color-jitter", type=NOT_NEGATIVE, default=0.0, metavar="X", help="strength of the color jitter")


def _add_student(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("student")
    add = group.add_argument
    add(
        "--model",
        type=not_empty,
        default="vidt_nano",
        metavar="MODEL",
        help="vidt_nano, vidt_tiny, vidt_small or vidt_base; fcos:, retinanet: or rtdetr: with a timm backbone, such "
        "as fcos:resnet18; or a directory that transformers wrote",
    )
    add(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="K=V",
        help="more arguments. vidt: those of DeformableDetrConfig (encoder_layers, num_queries, ...), and with the "
        "prefix backbone_ those of SwinConfig; fcos, retinanet: width, score_thresh, nms_thresh; rtdetr: those of "
        "RTDetrConfig",
    )
    add("--pretrained", action="store_true", help="start the backbone with published ImageNet weights")
    add(
        "--backbone-checkpoint",
        default="",
        metavar="PATH",
        help="weights to start the backbone with: a file of timm's, or a directory with a Swin",
    )
    add("--initial-checkpoint", default="", metavar="FILE", help="weights to start the whole detector with")
    add(
        "--freeze-bn",
        action="store_true",
        help="the backbone's batch norms keep their statistics (fcos, retinanet, rtdetr)",
    )


def _add_distillation(parser: argparse.ArgumentParser) -> None:
    from ..objectives.options import add_cache, add_projection, add_stages, add_teacher, add_weights

    group = parser.add_argument_group("knowledge distillation")
    add = group.add_argument
    add(
        "--kd-model-name",
        type=not_empty,
        nargs="+",
        metavar="MODEL",
        help="teachers: at most one detector, named as for --model, and any number of timm's models, of which only "
        "features are read",
    )
    add(
        "--kd-teacher-path",
        type=not_empty,
        nargs="+",
        metavar="FILE",
        help="weights of each teacher, except transformers' directories; default: pretrained, which stands for the "
        "own weights of a timm model",
    )
    add(
        "--kd-model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="K=V",
        help="more arguments of each teacher: as --model-kwargs, or those of timm.create_model",
    )
    add(
        "--kd-distill-type",
        nargs="+",
        choices=DISTILL_TYPES,
        metavar="TYPE",
        help="what the student imitates. token: ViDT's token matching; feature: maps; prediction: classes and boxes; "
        "several: one objective each (default: token; fcos and retinanet: feature and prediction; timm model: feature)",
    )
    add_weights(group)
    add_projection(group)
    add_stages(group)
    add_teacher(group)
    add("--kd-token-root", action="store_true", help="take the root of the token loss, as ViDT's code does")
    add(
        "--kd-match",
        choices=["auto", "hungarian", "index"],
        default="auto",
        help="pair queries by their predictions (hungarian) or by number (index); auto: by number if they are shared",
    )
    add("--kd-share-queries", action="store_true", help="the student starts with the teacher's queries")
    add_cache(
        group,
        "for --kd-distill-type prediction alone",
        "places or queries of each image, those where the teacher's confidence in an object is highest",
    )
