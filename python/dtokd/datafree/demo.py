"""`dtokd demo --data-free`: the same student without data, with data, on noise, and what was made for it."""

from __future__ import annotations

import time
from html import escape
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ..compare.page import mean_curve
from ..demo.data import write_digits
from ..demo.run import SHARED, STUDENT, TEACHER, options_of
from ..files import write_text
from ..report.chart import line_chart
from ..report.columns import read_columns
from ..report.html import document, table
from ..report.synthetic import synthetic_part
from ..train import options as train_options
from ..train.progress import Progress
from ..train.run import train

#: Options of all students: as `dtokd demo`'s, whose optimizer without a balance is AdamW.
_STUDENT = STUDENT.replace("dtoadamw", "adamw") + " --kd-distill-type logit --resume auto --task-loss-weight 0.1"
_MADE = "--data-free fast --df-width 16 --df-latent-dim 64 --hflip 0 --df-iterations 188"
#: Each student: what it is called in the table, its options, and whether it has the students' digits.
RUNS = {
    "noise": (
        "noise of an untrained generator",
        f"{_MADE} --df-warmup 60 --df-every 188 --df-steps 1 --df-lr 1e-9 --df-latent-lr 1e-9",
        False,
    ),
    "made": ("images made from the teacher", f"{_MADE} --df-every 4", False),
    "data": ("500 real digits, 12 copies each", "", True),
}


def run(output: Path, seed: int) -> int:
    """Train a teacher on digits and students of it, with and without digits, and compare them.

    Args:
        output: the directory of everything; runs that are finished there are not trained again.
        seed: of the students.

    Returns:
        0, or 128 and the number of the signal that ended it.

    Effects: sets torch to one thread, as another number of threads rounds otherwise.
    """
    start = time.monotonic()
    torch.set_num_threads(1)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    write_digits(output / "digits")
    students = output / f"seed-{seed}"  # a run goes on with its own seed alone
    argv = [*SHARED.split(), *TEACHER.split(), "--output", str(output)]
    argv += ["--data-dir", str(output / "digits" / "teacher")]
    if code := _train(argv, console):
        return code
    for name, (_, texts, has_data) in RUNS.items():
        # both folders hold the same digits to judge by
        argv = [*SHARED.split(), *_STUDENT.split(), *texts.split(), "--experiment", name, "--seed", str(seed)]
        argv += ["--kd-teacher-path", str(output / "teacher"), "--output", str(students)]
        argv += ["--data-dir", str(output / "digits" / ("students" if has_data else "teacher"))]
        if code := _train(argv, console):
            return code
    folders = {name: students / name for name in RUNS} | {"teacher": output / "teacher"}
    accuracies = {name: read_columns(path / "summary.csv")["eval_top1"][-1] for name, path in folders.items()}
    rows = list(_rows(accuracies))
    shown = Table(box=box.SIMPLE, padding=(0, 1))
    for heading in _HEAD:
        shown.add_column(heading, justify="left" if heading == _HEAD[0] else "right")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    page = students / "report.html"
    write_text(page, _page(students, rows))
    picture = max((students / "made" / "synthetic").glob("epoch-*.png"))
    console.print(f"{time.monotonic() - start:.0f} s; the images that were made: {picture}; all: {page}")
    return 0


_HEAD = ("the student learns from", "top1, %", "of that with data, %")


def _rows(accuracies: dict[str, float]) -> list[tuple[str, ...]]:
    rows = [
        (RUNS[name][0], f"{accuracies[name]:.1f}", f"{100 * accuracies[name] / accuracies['data']:.0f}")
        for name in RUNS
    ]
    return [*rows, ("(the teacher, of 3000 digits)", f"{accuracies['teacher']:.1f}", "")]


def _page(students: Path, rows: list[tuple[str, ...]]) -> str:
    lines = {
        title: mean_curve([read_columns(students / name / "summary.csv")], "eval_top1")
        for name, (title, *_) in RUNS.items()
    }
    links = ", ".join(f'<a href="{name}/report.html">{escape(name)}</a>' for name in RUNS)
    parts = [
        "<h1>dtokd demo --data-free</h1>",
        f"<p>{escape(_NOTE)}</p>",
        table([_HEAD, *rows]),
        f'<div class="grid-of">{line_chart("Accuracy on real digits, percent", lines, "epoch")}</div>',
        synthetic_part(students / "made"),
        f"<p>Reports of the runs: {links}.</p>",
    ]
    return document("dtokd demo --data-free", parts)


_NOTE = (
    "One small student, three times; top1 on 2000 distorted digits that no model was trained on, after the last epoch, "
    "of one seed: differences of a point or two are noise."
)


def _train(argv: list[str], console: Console) -> int:
    options = options_of(train_options, "train", argv, console)
    return train(options, Progress(options.epochs, console)).exit_code
