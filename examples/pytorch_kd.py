"""Distillation in a plain PyTorch loop.

    python examples/pytorch_kd.py

`backward` of the optimizer takes all losses; everything else is as with torch.optim.AdamW.
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


def main(epochs: int = 6) -> float:
    """Train on random inputs that a random teacher labels; returns the student's accuracy."""
    torch.manual_seed(0)
    inputs, teacher = torch.randn(640, 64), nn.Linear(64, 10).requires_grad_(False)
    labels = teacher(inputs).argmax(1)
    student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = dk.DTOAdamW(student.parameters(), lr=1e-2, max_norm=1.0)  # max_norm in place of clip_grad_norm_
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 20)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).chunk(20):
            losses = losses_of(student(inputs[batch]), teacher(inputs[batch]), labels[batch])
            optimizer.backward(losses)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    accuracy = float((student(inputs).argmax(1) == labels).double().mean())
    print(f"accuracy {accuracy:.3f}, last weights {[round(w, 3) for w in optimizer.balance.weights.tolist()]}")
    return accuracy


if __name__ == "__main__":
    main()
