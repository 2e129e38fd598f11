"""Distillation in Lightning: a balanced step in manual optimisation.

    python examples/lightning_kd.py

Manual optimisation, as each loss takes a backward pass of its own, into a gradient set of its own. With
`precision="16-mixed"` pass `scaler=self.trainer.precision_plugin.scaler` to `backward`.
"""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dtokd_kernels as dk


class Distillation(lightning.LightningModule):
    """A student that learns from labels and from a frozen teacher."""

    def __init__(self, teacher: nn.Module, student: nn.Module, temperature: float = 4.0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student
        self.temperature = temperature

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """One balanced step."""
        inputs, labels = batch
        optimizer = self.optimizers(use_pl_optimizer=True)
        logits = self.student(inputs)
        soft, target = (t / self.temperature for t in (logits, self.teacher(inputs)))
        losses = {
            "task": F.cross_entropy(logits, labels),
            "distill": F.kl_div(soft.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True),
        }
        optimizer.optimizer.backward(losses)  # not self.manual_backward, which takes one loss
        optimizer.step()  # Lightning's wrapper, so that callbacks and the step counter see it
        optimizer.zero_grad()
        self.lr_schedulers().step()
        balance = optimizer.optimizer.balance
        self.log_dict({**losses, "weight_distill": balance.weights[1], "conflict": balance.conflict.double()})

    def configure_optimizers(self) -> dict:
        """AdamW on the balanced direction; clipping belongs to it, not to the Trainer."""
        optimizer = dk.DTOAdamW(self.student.parameters(), lr=1e-2, max_norm=1.0)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)}


def main(steps: int = 120) -> Distillation:
    """Train on random inputs that a random teacher labels; returns the trained module."""
    lightning.seed_everything(0)
    inputs, teacher = torch.randn(640, 64), nn.Linear(64, 10).requires_grad_(False)
    labels = teacher(inputs).argmax(1)
    student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    module = Distillation(teacher, student)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(inputs, labels), batch_size=32, shuffle=True))
    metrics = {name: round(float(value), 3) for name, value in trainer.callback_metrics.items()}
    accuracy = float((module.student(inputs).argmax(1) == labels).double().mean())
    print(f"after {trainer.global_step} steps: accuracy {accuracy:.3f}, {metrics}")
    return module


if __name__ == "__main__":
    main()
