"""`dtokd demo`: one teacher, and the same small student distilled in every way that there is to compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels.weighting import DTO, Fixed, LogSum

from ..files import as_json
from . import report
from .agreement import Agreement, compare_steps
from .data import Digits, load_digits
from .models import make_model, seeded
from .objectives import new_student
from .report import Compared, Run
from .train import Method, accuracy, train_student, train_teacher

METHODS = {
    "task": Method("task alone", Fixed()),
    "sum": Method("weighted sum", Fixed()),
    "log-sum": Method("sum of log losses", LogSum()),
    "dto": Method("DTO-KD", DTO()),
    "dto-reference": Method("DTO-KD, reference", DTO(), backend="reference"),
}
#: The methods for two losses.
DISTILLED = ("sum", "log-sum", "dto", "dto-reference")
#: Steps over which fused and reference are compared.
COMPARED_STEPS = 50


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        output: directory for results.csv, curves.csv, agreement.csv, settings.json, demo.png and students/.
        seed: of everything random; the same seed gives the same numbers, times apart.
        iterations: of each student.
        teacher_iterations: of the teacher.
        threads: of torch, for the whole process. Another number of threads rounds differently.
        objectives: what the students imitate, "logit" or "feature".
    """

    output: Path
    seed: int
    iterations: int
    teacher_iterations: int
    threads: int
    objectives: Sequence[str]


def run(settings: Settings) -> int:
    """Train, compare, report.

    Returns:
        0, or 1 if fused and reference step differ by more than rounding explains.
    """
    start = time.perf_counter()
    torch.set_num_threads(settings.threads)
    backend = dk.backend_info()
    console = Console(highlight=False, markup=False)
    console.print(f"balanced step: {backend['chosen for cpu']}; seed {settings.seed}, threads {settings.threads}")
    if backend["chosen for cpu"].startswith("reference"):
        console.print(f"DTO-KD is not fused here, both its rows run the reference; backend 'cpu': {backend['cpu']}")
    output = settings.output
    (output / "students").mkdir(parents=True, exist_ok=True)

    plan = [("none", "task")] + [(objective, name) for objective in settings.objectives for name in DISTILLED]
    steps = min(COMPARED_STEPS, settings.iterations)
    total = settings.teacher_iterations + len(plan) * settings.iterations + len(settings.objectives) * steps
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("images", total=total)
        digits = load_digits(settings.seed)
        lesson = _Lesson(settings, digits, lambda: progress.advance(bar))

        progress.update(bar, description="teacher")
        teacher = lesson.teacher()
        console.print(f"teacher: accuracy {accuracy(teacher, digits.test):.1%}")
        runs = {}
        for objective, name in plan:
            progress.update(bar, description=f"{objective} {name}")
            result = runs[objective, name] = lesson.distil(teacher, objective, name)
            console.print(f"{objective}, {result.title}: accuracy {result.accuracy:.1%}")
        comparisons = []
        for objective in settings.objectives:
            progress.update(bar, description=f"{objective} fused and reference")
            agreement = lesson.compare(teacher, objective, steps)
            fused, reference = runs[objective, "dto"], runs[objective, "dto-reference"]
            comparisons.append(Compared(objective, steps, agreement, fused, reference))

    facts = {**asdict(settings), "output": str(output), "timm": timm.__version__, **backend}
    (output / "settings.json").write_text(as_json(facts, indent=2) + "\n")
    report.write_results(output / "results.csv", runs.values())
    report.write_curves(output / "curves.csv", runs.values())
    report.write_agreement(output / "agreement.csv", comparisons)
    report.plot(output / "demo.png", [r for r in runs.values() if r.objective != "none"])
    console.print(report.table(runs.values()))
    for line in report.notes(list(runs.values()), comparisons, len(digits.test)):
        console.print(f"- {line}")
    console.print(f"{time.perf_counter() - start:.0f} s; see {output}")
    return 0 if all(c.agreement.holds for c in comparisons) else 1


@dataclass(frozen=True)
class _Lesson:
    """What the parts of a demo have in common."""

    settings: Settings
    digits: Digits
    advance: Callable[[], None]

    def teacher(self) -> nn.Module:
        with seeded(self.settings.seed):
            model = make_model("teacher")
        train_teacher(
            model,
            self.digits.teacher,
            iterations=self.settings.teacher_iterations,
            seed=self.settings.seed,
            advance=self.advance,
        )
        return model

    def distil(self, teacher: nn.Module, objective: str, name: str) -> Run:
        student, task = new_student(objective, teacher, self.settings.seed)
        method = METHODS[name]
        history = train_student(
            task,
            self.digits.student,
            method,
            iterations=self.settings.iterations,
            seed=self.settings.seed,
            advance=self.advance,
        )
        save_file(student.state_dict(), self.settings.output / "students" / f"{objective}-{name}.safetensors")
        return Run(objective, name, method.title, accuracy(student, self.digits.test), history)

    def compare(self, teacher: nn.Module, objective: str, steps: int) -> Agreement:
        _, task = new_student(objective, teacher, self.settings.seed)
        return compare_steps(
            task,
            self.digits.student,
            METHODS["dto"],
            METHODS["dto-reference"],
            steps=steps,
            iterations=self.settings.iterations,
            seed=self.settings.seed,
            advance=self.advance,
        )
