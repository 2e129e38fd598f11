"""Distillation in Lightning: a balanced optimizer in its automatic optimisation.

    python examples/lightning_kd.py

Two hooks replace what Lightning does with one loss and its `.grad`: `backward` gives all losses to the optimizer, and
`configure_gradient_clipping` lets the optimizer clip. Accumulation, precision, schedulers, clipping and checkpoints are
then as the Trainer's arguments say.
"""

from __future__ import annotations

from typing import Any

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
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student
        self.temperature = temperature

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The losses; their sum is for Lightning's logs."""
        inputs, labels = batch
        logits = self.student(inputs).float()  # in bf16 a small distance may be below zero
        soft, target = (t / self.temperature for t in (logits, self.teacher(inputs).float()))
        self.losses = {
            "task": F.cross_entropy(logits, labels),
            "distill": F.kl_div(soft.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True),
        }
        self.log_dict(self.losses)
        return sum(self.losses.values())

    def backward(self, loss: Tensor) -> None:
        """One backward pass per loss, in place of one of `loss`, which Lightning has divided and scaled."""
        self.optimizers(use_pl_optimizer=False).backward(
            self.losses,
            share=1 / self.trainer.accumulate_grad_batches,
            scaler=getattr(self.trainer.precision_plugin, "scaler", None),
        )

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """The optimizer clips the balanced direction: there is no `.grad` that Lightning could clip."""
        if gradient_clip_algorithm == "value":
            raise ValueError("balanced gradients are clipped by their norm; pass gradient_clip_algorithm='norm'")
        optimizer.max_norm = gradient_clip_val

    def on_train_start(self) -> None:
        """On several processes the gradients of each loss are averaged."""
        if self.trainer.world_size > 1:
            dk.distributed.attach(self.optimizers(use_pl_optimizer=False), self.trainer.strategy.model)

    def on_train_batch_end(self, *_: Any) -> None:
        """What the last step decided."""
        balance = self.optimizers(use_pl_optimizer=False).balance
        if balance is not None:
            self.log_dict({"grad_norm": balance.norm, "weight_distill": balance.weights[1]})

    def configure_optimizers(self) -> dict:
        """AdamW on the balanced direction."""
        optimizer = dk.DTOAdamW(self.student.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


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
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(inputs, labels), batch_size=16, shuffle=True))
    metrics = {name: round(float(value), 3) for name, value in trainer.callback_metrics.items()}
    accuracy = float((module.student(inputs).argmax(1) == labels).double().mean())
    print(f"after {trainer.global_step} steps: accuracy {accuracy:.3f}, {metrics}")
    return module


if __name__ == "__main__":
    main()
