"""The command line: `dtokd train`, `detect`, `eval`, `predict`, `export`, `report`, `compare`, `demo`, `doctor`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .compare import options as compare_options
from .detect import options as detect_options
from .errors import Diverged, ToldElsewhere, UsageError
from .train import options as train_options
from .train import reading
from .train.absent import ABSENT
from .values import COUNT, FRACTION, NATURAL, NOT_NEGATIVE, Parser, parser_of, path


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
        if command == "compare" and "--detect" in argv:
            options = reading.parse(_comparison_of_detectors(), argv[1:])
        elif command in ("train", "compare", "detect"):
            options = reading.parse(commands[command], argv[1:])
        elif command is not None:
            options = commands[command].parse_args(argv[1:])
        else:
            options = parser.parse_args(argv)
        if command == "completion":
            return _complete(parser, options.shell)
        from .files import writing

        option = "run_dir" if command in ("report", "eval") else "--output"
        with writing(getattr(options, option.strip("-"), None) or "a file", option):
            return _run(command, options)
    except BrokenPipeError:  # of the program that reads our output, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ToldElsewhere:
        return 2
    except UsageError as error:
        code = 1 if isinstance(error, Diverged) else 2
        # one raised in a worker process comes with its traceback in the text
        print(f"dtokd {command}: error: {str(error).rpartition('UsageError: ')[2].rstrip()}", file=sys.stderr)
        return code


def _run(command: str | None, options: argparse.Namespace) -> int:
    together = command == "train" or (command == "detect" and not options.demo)
    if not together and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        message = (
            f"torchrun has started {os.environ['WORLD_SIZE']} processes, which only dtokd train and dtokd detect need; "
            "start it without torchrun"
        )
        raise UsageError(message) if os.environ.get("RANK", "0") == "0" else ToldElsewhere(message)
    # imported only now: --help need not wait for torch and timm
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
        from .report.several import run as report

        return report(options)
    if command == "predict":
        from .predict import run as predict

        return predict(options)
    if command == "export":
        from .export import run as export

        return export(options)
    if command == "doctor":
        from .doctor import run as doctor

        return doctor()
    if options.data_free:
        from .datafree.demo import run as data_free_demo

        if len(options.seeds) > 1:
            raise UsageError(f"--seeds: {len(options.seeds)} seeds, but with --data-free there is one; pass one")
        return data_free_demo(options.output, options.seeds[0])
    from .demo.run import run as demo

    return demo(options.output, options.seeds, options.objectives)


def _parser() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="dtokd",
        description="Distil timm models and detectors, with balanced losses. `dtokd COMMAND --help` lists options.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="show the versions of this package, torch and timm, and exit"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module, text in (
        ("train", train_options, "distil a timm model from a timm model, or train it without a teacher"),
        ("detect", detect_options, "distil a detector, on data in COCO's format"),
        ("compare", compare_options, "find out whether distillation helps, and with which weighting"),
    ):
        usage = "%(prog)s [data-dir] [OPTION ...]"  # instead of a page of options, which follow with their texts
        module.add_arguments(commands.add_parser(name, help=text, absent=ABSENT, usage=usage))
    # no defaults in its help, as the run has them
    evaluation = commands.add_parser(
        "eval",
        help="measure a student, or any timm model, on validation images",
        description="Measure a student, or any timm model, on validation images. Options that are left out are those "
        "of the run; without a run they have the defaults of dtokd train.",
        formatter_class=argparse.HelpFormatter,
    )
    evaluation.add_argument(
        "run_dir", nargs="?", type=path, help="run of dtokd train or dtokd detect, whose student and options are used"
    )
    evaluation.add_argument("--checkpoint", type=path, metavar="FILE", help="weights to use instead of the run's best")
    _add_evaluation(evaluation)
    _add_predict(commands.add_parser("predict", help="find labels or boxes in images with the student of a run"))
    _add_export(commands.add_parser("export", help="write the student of a run for timm, torch.export or ONNX"))
    report = commands.add_parser("report", help="write the report.html of a run again, or one page on several runs")
    report.add_argument("run_dir", type=path, nargs="+", help="run of dtokd train or dtokd detect")
    report.add_argument("--baseline", type=path, metavar="RUN", help="run of the same student without a teacher")
    report.add_argument(
        "--output", type=path, metavar="FILE", help="file of the page on several runs (default: runs.html)"
    )
    commands.add_parser("doctor", help="show what was built, what is used, and why")
    completion = commands.add_parser("completion", help="print a script that completes commands and options in a shell")
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="shell of the script")
    demo = commands.add_parser(
        "demo",
        help="distil a small student on real digits in a few minutes and compare the ways to combine its losses",
    )
    demo.add_argument("--output", type=path, default=Path("runs/demo"), metavar="DIR", help="directory for the results")
    demo.add_argument(
        "--seeds",
        type=NATURAL,
        nargs="+",
        default=[0],
        metavar="N",
        help="seeds; each student is trained with each seed",
    )
    demo.add_argument(
        "--objectives",
        nargs="+",
        choices=["logit", "feature"],
        default=["logit", "feature"],
        metavar="TYPE",
        help="what the students imitate: predictions (logit) or features of the teacher",
    )
    demo.add_argument(
        "--data-free", action="store_true", help="instead train a student without data, with data, and on noise"
    )
    return parser, commands.choices


def _comparison_of_detectors() -> Parser:
    parser = Parser(prog="dtokd compare", absent=ABSENT, usage="%(prog)s --detect [data-dir] [OPTION ...]")
    compare_options.add_arguments(parser, detect_options)
    return parser


class _Version(argparse.Action):
    """Without importing torch, which takes seconds."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from importlib.metadata import PackageNotFoundError, version

        def of(package: str) -> str:
            try:
                return version(package)
            except PackageNotFoundError:
                return "not installed"

        print(f"dtokd {of('dtokd-kernels')}, torch {of('torch')}, timm {of('timm')}")
        parser.exit()


def _complete(parser: Parser, shell: str) -> int:
    try:
        import shtab
    except ImportError:
        raise UsageError(
            "dtokd completion: the package shtab is not installed; pip install 'dtokd-kernels[completion]'"
        ) from None
    print(shtab.complete(parser, shell=shell))
    return 0


def _add_predict(parser: Parser) -> None:
    add = parser.add_argument
    add("run_dir", type=path, help="run of dtokd train or dtokd detect")
    add("paths", type=path, nargs="+", help="images or folders of images")
    add(
        "--output",
        type=path,
        metavar="DIR",
        help="directory for predictions.json and pictures; default: neither is written",
    )
    add("--checkpoint", type=path, metavar="FILE", help="weights to use instead of the run's best")
    add("--top", type=COUNT, default=5, metavar="N", help="number of labels of each image (classifiers)")
    add("--threshold", type=FRACTION, default=0.3, metavar="P", help="lowest score of a box (detectors)")
    add("-b", "--batch-size", type=COUNT, default=16, metavar="N", help="images per batch")
    add("-j", "--workers", type=NATURAL, default=0, metavar="N", help="processes that load images")
    add("--device", default="cuda", help="torch device; cuda falls back to cpu where torch has no GPU")


def _add_export(parser: Parser) -> None:
    add = parser.add_argument
    add("run_dir", type=path, help="run of dtokd train or dtokd detect")
    add(
        "--format",
        choices=["timm", "torch", "onnx"],
        default="timm",
        help="timm: a folder in the layout of timm's hub; torch: a program of torch.export; onnx: an ONNX model",
    )
    add(
        "--output",
        type=path,
        metavar="DIR",
        help="directory to write to; default: export/FORMAT in the run's directory",
    )
    add("--checkpoint", type=path, metavar="FILE", help="weights to use instead of the run's best")
    add("--data-dir", type=path, metavar="DIR", help="directory of the run's validation images, if they were moved")
    add(
        "--images",
        type=COUNT,
        default=16,
        metavar="N",
        help="number of validation images on which the export is compared",
    )
    add(
        "--tolerance",
        type=NOT_NEGATIVE,
        default=1e-4,
        metavar="X",
        help="largest allowed difference of an output to the student's own, as a part of the largest output",
    )


#: Options of `dtokd train` that `dtokd eval` has too.
_OF_EVALUATION = (
    *("data_dir", "dataset", "val_split", "dataset_download", "class_map", "on_bad_image", "workers", "batch_size"),
    *("device", "model", "pretrained", "num_classes", "img_size", "in_chans", "input_size", "crop_pct", "mean", "std"),
    *("interpolation", "model_kwargs", "amp", "amp_dtype"),
)
#: What they mean there, where it is not the same.
_HELP_OF_EVALUATION = {"batch_size": "images per batch", "val_split": "split to evaluate on"}


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    """What is not given comes from the run, or has the default of `dtokd train`."""
    for action in parser_of(train_options)._actions:
        if action.dest in _OF_EVALUATION and action.option_strings:
            action.default = None
            action.help = _HELP_OF_EVALUATION.get(action.dest, action.help)
            parser._add_action(action)
