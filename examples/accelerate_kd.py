"""Distillation with Accelerate: balanced gradients, accumulated over micro-batches.

    python examples/accelerate_kd.py        # or: accelerate launch examples/accelerate_kd.py

`accelerator.backward` takes one loss; the balanced optimizer inside Accelerate's wrapper takes them all. One process:
nothing here averages gradient sets over ranks. For fp16 pass `scaler=accelerator.scaler` to `backward`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtokd_kernels as dk

CLASSES, FEATURES, TEMPERATURE = 10, 64, 4.0


def network(width: int) -> nn.Module:
    """A small classifier."""
    return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))


def main(epochs: int = 6, accumulate: int = 2) -> float:
    """Train on points around ten centres; returns the student's accuracy."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    labels = torch.arange(640) % CLASSES
    inputs = torch.randn(CLASSES, FEATURES)[labels] + torch.randn(len(labels), FEATURES)
    teacher, student = network(128), network(16)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(30):
        F.cross_entropy(teacher(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher.requires_grad_(False)

    loader = DataLoader(TensorDataset(inputs, labels), batch_size=32, shuffle=True)
    wrapped = dk.DTOAdamW(student.parameters(), lr=1e-2, max_norm=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(wrapped, epochs * len(loader) // accumulate)
    student, wrapped, loader, schedule = accelerator.prepare(student, wrapped, loader, schedule)
    balanced = wrapped.optimizer  # the DTOAdamW
    for _ in range(epochs):
        for batch, targets in loader:
            with accelerator.accumulate(student):
                logits = student(batch)
                soft, target = logits / TEMPERATURE, teacher(batch) / TEMPERATURE
                losses = {
                    "task": F.cross_entropy(logits, targets),
                    "distill": F.kl_div(
                        soft.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True
                    ),
                }
                balanced.backward(losses, share=1 / accumulate)
                wrapped.step()  # only at the end of an accumulation, as zero_grad and the schedule
                schedule.step()
                wrapped.zero_grad()
    accuracy = float((student(inputs).argmax(1) == labels).double().mean())
    print(f"accuracy {accuracy:.3f}, last weights {[round(w, 3) for w in balanced.balance.weights.tolist()]}")
    return accuracy


if __name__ == "__main__":
    main()
