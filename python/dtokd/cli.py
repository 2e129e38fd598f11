"""The command line: `dtokd train`, `detect`, `eval`, `report`, `compare`, `demo`, `doctor`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .compare import options as compare_options
from .detect import options as detect_options
from .errors import Diverged, ToldElsewhere, UsageError
from .train import options as train_options
from .values import NATURAL, Parser, parser_of, path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: what follows the program's name; default: this process's arguments.

    Returns:
        0; 1 if the command found something wrong, or training diverged; 2 for what the user has to set right, such as
        a bad option; or 128 and the number of the signal that ended it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parser()
    command = argv[0] if argv and argv[0] in commands else None
    try:
        if command in ("train", "compare", "detect"):
            options = train_options.parse(commands[command], argv[1:])
        else:
            options = parser.parse_args(argv)
        from .files import writing

        option = "run_dir" if command in ("report", "eval") else "--output"
        with writing(getattr(options, option.strip("-"), "a file"), option):
            return _run(command, options)
    except ToldElsewhere:
        return 2
    except UsageError as error:
        code = 1 if isinstance(error, Diverged) else 2
        # one raised in a worker process comes with its traceback in the text
        print(f"dtokd {command}: error: {str(error).rpartition('UsageError: ')[2].rstrip()}", file=sys.stderr)
        return code


def _run(command: str | None, options: argparse.Namespace) -> int:
    if command != "train" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        message = f"torchrun has started {os.environ['WORLD_SIZE']} processes, which only dtokd train needs"
        raise UsageError(message) if os.environ.get("RANK", "0") == "0" else ToldElsewhere(message)
    # imported only now: --help need not wait for timm and matplotlib
    if command == "train":
        from .train.run import train

        return train(options).exit_code
    if command == "detect":
        from .detect.install import check_installed

        check_installed(options)
        if options.demo:
            from .detect.demo import run as detect_demo

            return detect_demo(options)
        from .detect.run import detect

        return detect(options).exit_code
    if command == "compare":
        from .compare.run import run as compare

        return compare(options)
    if command == "eval":
        from .evaluate import run as evaluate

        evaluate(options, vars(parser_of(train_options).parse_args([])))
        return 0
    if command == "report":
        from .report.page import write_report

        print(write_report(options.run_dir))
        return 0
    if command == "doctor":
        from .doctor import run as doctor

        return doctor()
    from .demo.run import run as demo

    return demo(options.output, options.seeds, options.objectives)


def _parser() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(prog="dtokd", description="Distillation with DTO-KD's balanced step.")
    commands = parser.add_subparsers(dest="command", required=True)
    shown: Any = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    for name, module, text in (
        ("train", train_options, "distil any timm student from any timm teacher"),
        ("detect", detect_options, "distil a detector on data in COCO's format"),
        ("compare", compare_options, "is distillation helping, with which rule, and is the difference real?"),
    ):
        module.add_arguments(commands.add_parser(name, help=text, allow_abbrev=False, **shown))
    evaluation = commands.add_parser("eval", help="a student's accuracy", argument_default=None, allow_abbrev=False)
    evaluation.add_argument("run_dir", nargs="?", type=path, help="of dtokd train: its student and its options")
    evaluation.add_argument("--checkpoint", type=path, metavar="FILE", help="other weights than the run's best")
    _add_evaluation(evaluation)
    report = commands.add_parser("report", help="write a run directory's report.html anew")
    report.add_argument("run_dir", type=path, help="of dtokd train")
    commands.add_parser("doctor", help="what was built, what is chosen, and why")
    demo = commands.add_parser(
        "demo",
        help="distil a small student on real digits in a few minutes and compare the ways to combine its losses",
        **shown,
    )
    demo.add_argument("--output", type=path, default=Path("runs/demo"), help="directory for the results")
    demo.add_argument("--seeds", type=NATURAL, nargs="+", default=[0], metavar="N", help="each student with each")
    demo.add_argument(
        "--objectives",
        nargs="+",
        choices=["logit", "feature"],
        default=["logit", "feature"],
        help="what the students imitate: the teacher's predictions, its features",
    )
    return parser, commands.choices


#: Options of `dtokd train` that `dtokd eval` has too.
_OF_EVALUATION = (
    *("data_dir", "dataset", "val_split", "dataset_download", "class_map", "on_bad_image", "workers", "batch_size"),
    *("device", "model", "pretrained", "num_classes", "img_size", "in_chans", "input_size", "crop_pct", "mean", "std"),
    *("interpolation", "model_kwargs", "amp", "amp_dtype"),
)


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    """What is not given comes from the run, or has the default of `dtokd train`."""
    for action in parser_of(train_options)._actions:
        if action.dest in _OF_EVALUATION:
            action.default = None
            parser._add_action(action)
