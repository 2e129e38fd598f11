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

TEMPERATURE = 4.0


def losses_of(logits: Tensor, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The task's loss and the distance to the teacher's softened predictions."""
    soft, wanted = (t.log_softmax(1) for t in (logits / TEMPERATURE, target / TEMPERATURE))
    distill = F.kl_div(soft, wanted, reduction="batchmean", log_target=True)
    return {"task": F.cross_entropy(logits, labels), "distill": distill}


def main(epochs: int = 6, accumulate: int = 2) -> float:
    """Train on random inputs that a random teacher labels; returns the student's accuracy."""
    torch.manual_seed(0)
    inputs, teacher = torch.randn(640, 64), nn.Linear(64, 10).requires_grad_(False)
    labels = teacher(inputs).argmax(1)
    student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
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
