"""How close each source's weights are to the exact ones over a student's training, and where training with it ends.

The student of `digits` learns real digits (MNIST-5k, distorted) from its teacher, with a feature loss (weights inside
the simplex) and with a logit loss (mostly at a vertex). Weights are compared on the same iterates, those of exact
training: each source looks at every batch and its weights are put aside. "Shared" weights are compared with shared
ones: private parameters stay out of the exact Gram matrix, as they do by default. The yardstick is a constant, the mean
of the exact weights: what is no closer than that has no information about single iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from timm.task import TrainingTask
from torch import Tensor, nn

import dtokd_kernels as dk
from dtokd_kernels.sources import Ema, Every, Feature, Probe, Source
from dtokd_kernels.weighting import Amortized, Fixed

from .digits import (
    LEARNING_RATE,
    MAX_NORM,
    WEIGHT_DECAY,
    Digits,
    Images,
    accuracy,
    load_digits,
    make_model,
    new_student,
    one_cycle,
    seeded,
    train_teacher,
)
from .record import Measurement

EXACT = "exact"
LAG = "lag"
CONSTANT = "constant: mean of the exact weights"
PRIVATE = "exact, private parameters balanced too"

#: What an optimizer of a student is made with, besides what all have.
Options = dict[str, object]


def last_block(student: nn.Module) -> Iterator[nn.Parameter]:
    """The last stage of the student, which task and distillation share."""
    return student.get_submodule("layer4").parameters()


#: How a student can be trained; the first is what the others are compared with.
TRAINED: dict[str, Callable[[nn.Module], Options]] = {
    EXACT: lambda student: {"gram": "exact"},
    "overlap": lambda student: {"gram": "overlap"},
    LAG: lambda student: {"gram": "lag"},
    "probe, last stage": lambda student: {"gram": Probe(last_block(student))},
    "probe, last 1/16 of the parameters": lambda student: {"gram": Probe()},
    "feature, last stage's output": lambda student: {"gram": Feature(student.get_submodule("layer4"))},
    "every 2": lambda student: {"gram": Every(2)},
    "every 5": lambda student: {"gram": Every(5)},
    "every 10": lambda student: {"gram": Every(10)},
    "ema 0.9": lambda student: {"gram": Ema(0.9)},
    "every 5 of ema 0.9": lambda student: {"gram": Every(5, Ema(0.9))},
    PRIVATE: lambda student: {"gram": "exact", "private": "balanced"},
    "amortized, famo": lambda student: {"weighting": Amortized()},
    "amortized, famo, rescaled": lambda student: {"weighting": Amortized(), "rescale": "sum"},
    "weighted sum, 1/2 each": lambda student: {"weighting": Fixed()},
}
#: Those whose weights are looked at beside the exact ones. "lag" has the exact weights of the step before.
LOOKED_AT = tuple(name for name in TRAINED if name not in (EXACT, "overlap", LAG) and "amortized" not in name)[:-1]


@dataclass(frozen=True)
class Lesson:
    """One teacher with its data.

    Attributes:
        seed: of the data, the initial parameters and the batches.
        digits: what there is to learn.
        teacher: trained, frozen.
    """

    seed: int
    digits: Digits
    teacher: nn.Module

    @classmethod
    def prepare(cls, seed: int, iterations: int) -> Lesson:
        """Load the data and train the teacher."""
        digits = load_digits(seed)
        with seeded(seed):
            teacher = make_model("teacher")
        train_teacher(teacher, digits.teacher, iterations=iterations, seed=seed)
        return cls(seed, digits, teacher)

    def student(self, objective: str) -> tuple[nn.Module, TrainingTask]:
        """A new student and what computes its losses; the same for each call."""
        return new_student(objective, self.teacher, self.seed)

    @property
    def images(self) -> Images:
        """What the students learn from."""
        return self.digits.student


def optimizer_of(task: TrainingTask, options: Options) -> dk.DTOAdamW:
    """With the settings that all students share."""
    params = [p for p in task.parameters() if p.requires_grad]
    settings: Options = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "max_norm": MAX_NORM, **options}
    return dk.DTOAdamW(params, **settings)  # type: ignore[arg-type]


def final_accuracy(lesson: Lesson, objective: str, name: str, iterations: int) -> float:
    """Test accuracy of a student that was trained in one of the ways of `TRAINED`."""
    student, task = lesson.student(objective)
    optimizer = optimizer_of(task, TRAINED[name](student))
    schedule = one_cycle(optimizer, iterations)
    for inputs, labels in lesson.images.batches(iterations, lesson.seed):
        optimizer.backward(task(inputs, labels)["objectives"])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return accuracy(student, lesson.digits.test)


def watched_weights(lesson: Lesson, objective: str, iterations: int) -> dict[str, Tensor]:
    """Weights of the distillation loss [iterations], by source, along exact training."""
    student, task = lesson.student(objective)
    optimizer = optimizer_of(task, TRAINED[EXACT](student))
    schedule = one_cycle(optimizer, iterations)
    params = [p for p in task.parameters() if p.requires_grad]
    looks: dict[str, Options] = {name: TRAINED[name](student) for name in LOOKED_AT}
    found: dict[str, list[Tensor]] = {name: [] for name in (EXACT, *looks)}
    for inputs, labels in lesson.images.batches(iterations, lesson.seed):
        losses = task(inputs, labels)["objectives"]
        for name, options in looks.items():
            source = options["gram"]
            assert isinstance(source, Source | str)
            private = options.get("private", "own")
            record = dk.backward(losses, params, gram=source, private=private, retain_graph=True)  # type: ignore[arg-type]
            found[name].append(record.weights[1])
            for p in params:
                p.grad = None
        optimizer.backward(losses)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        assert optimizer.balance is not None
        found[EXACT].append(optimizer.balance.weights[1])
    weights = {name: torch.stack(values) for name, values in found.items()}
    exact = weights[EXACT]
    weights[LAG] = torch.cat([exact[:1], exact[:-1]])
    weights[CONSTANT] = exact.mean().expand_as(exact)
    return weights


def compare(weights: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """By source: mean weight of the distillation loss, mean absolute error, correlation with the exact weights.

    A correlation is NaN where one of the two does not vary.
    """
    exact = weights[EXACT]
    return {
        name: {
            "mean weight": float(w.mean()),
            "error": float((w - exact).abs().mean()),
            "correlation": float(torch.corrcoef(torch.stack([w, exact]))[0, 1]),
        }
        for name, w in weights.items()
    }


def measure(
    objectives: list[str], seeds: list[int], iterations: int, teacher_iterations: int, advance: Callable[[str], None]
) -> list[Measurement]:
    """Closeness and accuracies; a value per seed.

    Args:
        objectives: "feature", "logit".
        seeds: one teacher and one student of each kind for each.
        iterations: of each student.
        teacher_iterations: of the teacher.
        advance: takes a line on what was done.
    """
    lessons = []
    for seed in seeds:
        lessons.append(Lesson.prepare(seed, teacher_iterations))
        advance(f"teacher of seed {seed}: accuracy {accuracy(lessons[-1].teacher, lessons[-1].digits.test):.1%}")
    results = []
    config = f"{len(seeds)} seeds, {iterations} iterations"
    threads = torch.get_num_threads()

    def put(objective: str, name: str, metric: str, unit: str, values: list[float]) -> None:
        results.append(Measurement("closeness", name, objective, metric, unit, "demo", values, threads, config))

    for objective in objectives:
        compared = [compare(watched_weights(lesson, objective, iterations)) for lesson in lessons]
        for name, metrics in compared[0].items():
            for metric in metrics:
                put(objective, name, metric, "1", [run[name][metric] for run in compared])
        advance(f"{objective}: weights compared")
        exact: list[float] = []
        for name in TRAINED:
            reached = [100 * final_accuracy(lesson, objective, name, iterations) for lesson in lessons]
            exact = exact or reached
            put(objective, name, "accuracy", "%", reached)
            differences = [a - b for a, b in zip(reached, exact, strict=True)]
            put(objective, name, "accuracy - exact", "points", differences)
            advance(f"{objective}, {name}: accuracy {sum(reached) / len(reached):.1f} %")
    return results
