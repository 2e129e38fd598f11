"""The options of distillation, named as timm's train.py names them. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "knowledge distillation"."""
    group = parser.add_argument_group("knowledge distillation")
    group.add_argument("--kd-model-name", metavar="MODEL", help="timm's name of the teacher; without one none distils")
    group.add_argument(
        "--kd-teacher-path",
        type=Path,
        metavar="FILE",
        help="the teacher's weights (safetensors, or torch's format without pickled objects); without it timm "
        "downloads its own",
    )
    group.add_argument(
        "--kd-distill-type",
        choices=["logit", "feature", "token"],
        default="logit",
        help="imitate predictions, pooled features, or predictions with a distillation token",
    )
    group.add_argument("--kd-temperature", type=float, default=4.0, metavar="T", help="of the softened predictions")
    group.add_argument(
        "--kd-token-distill-type", choices=["soft", "hard"], default="soft", help="target of the distillation token"
    )
    group.add_argument(
        "--task-loss-weight", type=float, metavar="W", help="of the labels' loss; alone, the other is 1 - W"
    )
    group.add_argument(
        "--distill-loss-weight", type=float, metavar="W", help="of the teacher's loss; both weights are 1 by default"
    )
    group.add_argument("--kd-student-feature-dim", type=int, metavar="N", help="if timm cannot tell")
    group.add_argument("--kd-teacher-feature-dim", type=int, metavar="N", help="if timm cannot tell")
