"""The command line: `dtokd demo`, `dtokd doctor`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: what follows the program's name; default: this process's arguments.

    Returns:
        0, or 1 if the command found something wrong. A bad argument exits with 2, as argparse does.
    """
    options = vars(_parser().parse_args(argv))
    command = options.pop("command")
    # imported only now: --help need not wait for timm and matplotlib
    if command == "doctor":
        from .doctor import run as doctor

        return doctor()
    from .demo.run import Settings
    from .demo.run import run as demo

    return demo(Settings(**options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dtokd", description="Distillation with DTO-KD's balanced step.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what was built, what is chosen, and why")
    demo = commands.add_parser(
        "demo",
        help="distil a small student on real digits in a few minutes and compare the ways to combine its losses",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="directory for the results")
    demo.add_argument("--seed", type=int, default=0, help="of the data, the initial parameters and the batches")
    demo.add_argument("--iterations", type=_positive, default=400, help="of each student")
    demo.add_argument("--teacher-iterations", type=_positive, default=500, help="of the teacher")
    demo.add_argument("--threads", type=_positive, default=1, help="of torch; more are a little faster on idle cores")
    demo.add_argument(
        "--objectives",
        nargs="+",
        choices=["logit", "feature"],
        default=["logit", "feature"],
        help="what the students imitate: the teacher's predictions, its features",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "positive integer"  # argparse names the type in its message
