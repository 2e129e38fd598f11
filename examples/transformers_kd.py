"""Distillation in Hugging Face's Trainer: one loss with the balanced gradient.

    python examples/transformers_kd.py      # or: torchrun --nproc-per-node 2 examples/transformers_kd.py

`compute_loss` returns what `BalancedLoss` makes of the losses. The Trainer does the rest as ever: its optimizers,
accumulation, clipping, the `grad_norm` in its log, precision, several processes. Gradients are in `.grad` alone, which
its `model.zero_grad()` clears.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import dtokd_kernels as dk

TEMPERATURE = 4.0


def losses_of(logits: Tensor, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The task's loss and the distance to the teacher's softened predictions."""
    soft, wanted = (t.log_softmax(1) for t in (logits / TEMPERATURE, target / TEMPERATURE))
    distill = F.kl_div(soft, wanted, reduction="batchmean", log_target=True)
    return {"task": F.cross_entropy(logits, labels), "distill": distill}


class Points(Dataset[dict[str, Tensor]]):
    """Samples as the Trainer's collator wants them."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


class DistillationTrainer(Trainer):
    """A Trainer whose loss balances the task with a frozen teacher."""

    def __init__(self, *args: Any, teacher: nn.Module, balanced: dk.BalancedLoss, **options: Any) -> None:
        super().__init__(*args, **options)
        self.teacher, self.balanced = teacher.to(self.args.device), balanced
        # the losses are means over a micro-batch: the Trainer divides them by the number of accumulation steps
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The balanced loss; in evaluation, where nothing needs a gradient, the sum of the losses."""
        logits = model(inputs["inputs"])
        with torch.no_grad():
            target = self.teacher(inputs["inputs"])
        losses = losses_of(logits.float(), target.float(), inputs["labels"])
        loss = self.balanced(losses, features=logits, scaler=self.accelerator.scaler)
        return (loss, {"logits": logits}) if return_outputs else loss

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The averages of the balance become part of the optimizer's checkpoints."""
        optimizer = super().create_optimizer(*args)
        self.balanced.save_with(optimizer)
        return optimizer


def main(epochs: int = 12) -> float:
    """Train on random inputs that a random teacher labels; returns the student's accuracy."""
    torch.manual_seed(0)
    inputs, teacher = torch.randn(640, 64), nn.Linear(64, 10).requires_grad_(False)
    labels = teacher(inputs).argmax(1)
    student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    balanced = dk.BalancedLoss(dk.weighting.Share({"task": 0.5, "distill": 0.5}), gram=dk.sources.Feature())
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            remove_unused_columns=False,
            save_strategy="no",
            logging_steps=100,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = DistillationTrainer(
            student, options, train_dataset=Points(inputs, labels), teacher=teacher, balanced=balanced
        )
        trainer.train()
    norm = next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)
    accuracy = float((student(inputs).argmax(1) == labels).double().mean())
    print(f"accuracy {accuracy:.3f}, norm of the gradient in the log {norm:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
