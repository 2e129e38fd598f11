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
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dtokd_kernels as dk

TEMPERATURE = 4.0


def losses_of(logits: Tensor, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The task's loss and the distance to the teacher's softened predictions."""
    soft, wanted = (t.log_softmax(1) for t in (logits / TEMPERATURE, target / TEMPERATURE))
    distill = F.kl_div(soft, wanted, reduction="batchmean", log_target=True)
    return {"task": F.cross_entropy(logits, labels), "distill": distill}


def main(epochs: int = 12, accumulate: int = 2) -> float:
    """Train on random inputs that a random teacher labels; returns the student's accuracy."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    inputs, teacher = torch.randn(640, 64), nn.Linear(64, 10).requires_grad_(False)
    labels = teacher(inputs).argmax(1)
    student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=32, shuffle=True)
    wrapped = dk.DTOAdamW(student.parameters(), lr=1e-2, max_norm=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(wrapped, epochs * len(loader) // accumulate)
    student, wrapped, loader, schedule = accelerator.prepare(student, wrapped, loader, schedule)
    balanced = wrapped.optimizer  # the DTOAdamW
    for _ in range(epochs):
        for batch, targets in loader:
            with accelerator.accumulate(student):
                losses = losses_of(student(batch), teacher(batch), targets)
                balanced.backward(losses, share=1 / accumulate)
                wrapped.step()  # only at the end of an accumulation, as zero_grad and the schedule
                schedule.step()
                wrapped.zero_grad()
    accuracy = float((student(inputs).argmax(1) == labels).double().mean())
    print(f"accuracy {accuracy:.3f}, last weights {[round(w, 3) for w in balanced.balance.weights.tolist()]}")
    return accuracy


if __name__ == "__main__":
    main()
