"""Distillation with Accelerate: one loss with the balanced gradient.

    python examples/accelerate_kd.py        # or: accelerate launch examples/accelerate_kd.py

`accelerator.backward` takes one loss: `BalancedLoss` makes it. Everything else of the loop is as ever: optimizer,
accumulation, clipping, precision, several processes, checkpoints.
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
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader) // accumulate)
    balanced = dk.BalancedLoss(dk.weighting.Share({"task": 0.5, "distill": 0.5}), gram=dk.sources.Feature())
    accelerator.register_for_checkpointing(balanced)  # its averages are part of save_state and load_state
    student, optimizer, loader, schedule = accelerator.prepare(student, optimizer, loader, schedule)
    for _ in range(epochs):
        for batch, targets in loader:
            with accelerator.accumulate(student):
                logits = student(batch)
                losses = losses_of(logits, teacher(batch), targets)
                accelerator.backward(balanced(losses, features=logits, scaler=accelerator.scaler))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()  # only at the end of an accumulation, as zero_grad and the schedule
                schedule.step()
                optimizer.zero_grad()
    accuracy = float((student(inputs).argmax(1) == labels).double().mean())
    weights = [round(w, 3) for w in balanced.balance.weights.tolist()]
    accelerator.print(f"accuracy {accuracy:.3f}, last weights {weights}")
    return accuracy


if __name__ == "__main__":
    main()
