"""Distillation in float16 with a GradScaler, accumulated over micro-batches.

    python examples/amp_kd.py

The losses go in as they are: `scaler=` scales them, `share=` is each micro-batch's part of the batch. An overflow in
any loss's gradients skips the step and lowers the scale. Here on a CPU; write "cuda" in both places on a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtokd_kernels as dk

CLASSES, FEATURES, TEMPERATURE = 10, 64, 4.0


def network(width: int) -> nn.Module:
    """A small classifier."""
    return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))


def points() -> tuple[Tensor, Tensor]:
    """Inputs around ten centres, and the number of each one's centre."""
    labels = torch.arange(640) % CLASSES
    return torch.randn(CLASSES, FEATURES)[labels] + 2 * torch.randn(len(labels), FEATURES), labels


def trained_teacher(inputs: Tensor, labels: Tensor) -> nn.Module:
    """A wider network, trained on the labels and frozen."""
    teacher = network(128)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(30):
        F.cross_entropy(teacher(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return teacher.requires_grad_(False)


def losses_of(logits: Tensor, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The task's loss and the distance to the teacher's softened predictions."""
    soft, wanted = (t.log_softmax(1) for t in (logits / TEMPERATURE, target / TEMPERATURE))
    distill = F.kl_div(soft, wanted, reduction="batchmean", log_target=True)
    return {"task": F.cross_entropy(logits, labels), "distill": distill}


def main(epochs: int = 6, accumulate: int = 2) -> float:
    """Train on points around ten centres; returns the student's accuracy."""
    torch.manual_seed(0)
    inputs, labels = points()
    teacher, student = trained_teacher(inputs, labels), network(16)
    optimizer = dk.DTOAdamW(student.parameters(), lr=1e-2, max_norm=1.0)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(epochs):
        for number, batch in enumerate(torch.randperm(len(inputs)).chunk(20), 1):
            with torch.autocast("cpu", torch.float16):
                logits, target = student(inputs[batch]), teacher(inputs[batch])
            losses = losses_of(logits.float(), target.float(), labels[batch])
            optimizer.backward(losses, share=1 / accumulate, scaler=scaler)
            if number % accumulate == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    accuracy = float((student(inputs).argmax(1) == labels).double().mean())
    print(f"accuracy {accuracy:.3f}, skipped steps {int(optimizer.skipped_steps)}, scale {scaler.get_scale():g}")
    return accuracy


if __name__ == "__main__":
    main()
