"""`dtokd demo`: `dtokd train` for a teacher and `dtokd compare` for its students, on real digits, in minutes."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

import torch
from rich.console import Console

import dtokd_kernels as dk

from ..compare import options as compare_options
from ..compare import run as comparison
from ..compare.plan import Plan
from ..files import as_json, write_text
from ..train import options as train_options
from ..train.progress import Progress
from ..train.reading import parse
from ..train.run import train
from ..values import parser_of
from .agreement import compare_steps
from .data import write_digits

#: Options of the teacher and of all students, of the teacher alone, and of the students alone.
SHARED = (
    "--dataset torch/mnist --in-chans 1 --img-size 28 --mean 0.5 --std 0.5 --no-aug --crop-pct 1 --smoothing 0 -b 64 "
    "--lr 0.009 --weight-decay 0.05 --clip-grad 1 --warmup-epochs 1 --sched-on-updates --workers 0 --device cpu "
    "--checkpoint-hist 1 --no-log-tensorboard"
)
TEACHER = "--model test_resnet --opt adamw --epochs 2 --resume auto --experiment teacher"
STUDENT = "--model test_resnet --model-kwargs channels=[8,16,32,32] stem_width=4 --opt dtoadamw --epochs 4"
#: What is compared besides the student without a teacher.
ARMS = ("fixed:0.5", "logsum", "dto")
#: Steps over which the fused step and the reference are compared.
COMPARED_STEPS = 50


def run(output: Path, seeds: list[int], objectives: list[str]) -> int:
    """Train a teacher, compare students, compare the fused step with the reference.

    Args:
        output: the directory of everything; runs that are finished there are not trained again.
        seeds: of the students' parameters and batches; the digits and the teacher are the same for all.
        objectives: what the students imitate: "logit", "feature".

    Returns:
        0; 1 if the fused step and the reference differ by more than rounding explains, or all students have diverged;
        or 128 and the number of the signal that ended it.

    Effects: sets torch to one thread, as another number of threads rounds otherwise.
    """
    start = time.monotonic()
    torch.set_num_threads(1)
    backend = dk.backend_info()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"balanced step: {backend['chosen for cpu']}")
    if backend["chosen for cpu"].startswith("reference"):
        console.print(f"DTO-KD is not fused here, so the reference is compared with itself: {backend['cpu']}")
    write_digits(output / "digits")
    where = ["--output", str(output), "--data-dir"]
    argv = [*SHARED.split(), *TEACHER.split(), *where, str(output / "digits" / "teacher")]
    teacher = options_of(train_options, "train", argv, console)
    if code := train(teacher, Progress(teacher.epochs, console)).exit_code:
        return code
    failed, agreements = 0, []
    for objective in objectives:
        argv = [*SHARED.split(), *STUDENT.split(), *where, str(output / "digits" / "students")]
        argv += ["--kd-teacher-path", str(output / "teacher"), "--kd-distill-type", objective]
        argv += ["--arms", *ARMS, "--seeds", *map(str, seeds), "--experiment", objective]
        students = options_of(compare_options, "compare", argv, console)
        code = comparison.run(argparse.Namespace(**vars(students)))
        if code > 1:
            return code
        balanced = next(run.options for run in Plan(students).runs() if run.arm == "dto")
        agreement = compare_steps(balanced, COMPARED_STEPS)
        agreements.append({"objective": objective, "steps": COMPARED_STEPS, **vars(agreement)})
        console.print(f"{objective}: {agreement}")
        failed |= code or not agreement.holds
    write_text(output / "agreement.json", as_json(agreements, indent=1) + "\n")
    pages = ", ".join(str(output / objective / "report.html") for objective in objectives)
    console.print(f"{time.monotonic() - start:.0f} s; tables and curves: {pages}")
    return int(failed)


def options_of(module: object, command: str, argv: list[str], console: Console) -> argparse.Namespace:
    """The options of a command, which the user can give again by hand."""
    console.rule()
    console.print(f"dtokd {command} {shlex.join(argv)}")
    return parse(parser_of(module), argv)
