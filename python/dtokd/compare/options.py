"""The options of `dtokd compare`: those of `dtokd train` or `detect`, and what it varies. Imports nothing heavy."""

from __future__ import annotations

import argparse
from typing import Any

from ..train import options as shared
from ..values import COUNT, NATURAL, Number

#: What is compared without `--arms`.
ARMS = (
    "none",
    "fixed:0.3",
    "fixed:0.5",
    "fixed:0.7",
    "share:0.5",
    "taskfirst",
    "logsum",
    "famo",
    "heldout",
    "whilebetter",
    "dto",
)
#: Options of the comparison, which a run of it does not have.
OWN = ("arms", "seeds", "schedule_share", "judge_split", "jobs", "detect")


def add_arguments(parser: argparse.ArgumentParser, runs: Any = shared) -> None:
    """Add all options of `dtokd compare`.

    Args:
        parser: takes them.
        runs: the module with the options of its runs.
    """
    group = parser.add_argument_group(
        "comparison", "the options of this command; it sets --seed, --data-seed and --resume of its runs itself"
    )
    add = group.add_argument
    add("--detect", action="store_true", help="compare detectors: all other options are those of dtokd detect")
    add(
        "--arms",
        nargs="+",
        default=list(ARMS),
        metavar="ARM",
        help="ways to train. none: without a teacher, always added; fixed:W: timm's sum of W task + (1-W) distill; "
        "share:W: the task gets the share W of the gradient's norm; heldout:S, auto:S and whilebetter:S: the share S "
        "of the training images sets the weights; or any --kd-balance. Options follow a colon: "
        "dto:rescale=sum,gram=overlap,opt=dtoadamw,lr=0.001, and the rule's own, as in cagrad:c=0.4",
    )
    add(
        "--seeds",
        type=NATURAL,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="seeds; each arm is trained with each seed",
    )
    add(
        "--schedule-share",
        type=Number(float, above=0, most=1),
        default=1.0,
        metavar="X",
        help="shorten the schedule to this part of --epochs, of the warm-up and of the other options that count epochs",
    )
    add(
        "--judge-split",
        default="",
        metavar="NAME",
        help="split that judges the arms; --val-split then only chooses among them; default: --val-split does both",
    )
    add(
        "--jobs",
        type=COUNT,
        metavar="N",
        help="number of runs at a time, in processes of their own; default: one per GPU",
    )
    runs.add_arguments(parser)
    texts = {
        "dry_run": "list the runs and how long they take, and train none",
        "experiment": "folder of the comparison in --output (default: compare)",
    }
    for action in parser._actions:
        action.help = texts.get(action.dest, action.help)
