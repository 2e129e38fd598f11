"""Distillation with NVIDIA Model Optimizer: its layer matching and its losses, weighed by a rule of this package.

    pip install nvidia-modelopt
    python examples/modelopt_kd.py

`LossBalancer` stands where Model Optimizer's own balancers stand. `compute_kd_loss` then returns one loss with the
balanced gradient, so any loop or trainer goes on as it is.
"""

from __future__ import annotations

import modelopt.torch.distill as mtd
import torch
import torch.nn.functional as F
from dtokd.modelopt import LossBalancer
from torch import nn

import dtokd_kernels as dk


class Student(nn.Module):
    """Model Optimizer adds children to the module that it converts, which an `nn.Sequential` would call in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.body(inputs))


def main(epochs: int = 6) -> float:
    """Train on random inputs that a random teacher labels; returns the student's accuracy."""
    torch.manual_seed(0)
    inputs, teacher = torch.randn(640, 64), nn.Linear(64, 10)
    labels = teacher(inputs).argmax(1)
    student = Student()
    rule = dk.weighting.Share({"student_loss": 0.5, "LogitsDistillationLoss_0": 0.5})
    balanced = dk.BalancedLoss(rule, gram=dk.sources.Feature(student.head))  # at the logits, which both losses share
    criterion = mtd.LogitsDistillationLoss(temperature=4.0, reduction="batchmean")
    settings = {"teacher_model": teacher, "criterion": criterion, "loss_balancer": LossBalancer(balanced)}
    model = mtd.convert(student, mode=[("kd_loss", settings)])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    balanced.save_with(optimizer)  # its averages are part of the optimizer's checkpoints
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).chunk(20):
            loss = model.compute_kd_loss(student_loss=F.cross_entropy(model(inputs[batch]), labels[batch]))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    exported = mtd.export(model)
    accuracy = float((exported(inputs).argmax(1) == labels).double().mean())
    print(f"accuracy {accuracy:.3f}, last weights {[round(w, 3) for w in balanced.balance.weights.tolist()]}")
    return accuracy


if __name__ == "__main__":
    main()
