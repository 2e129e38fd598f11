"""Distillation in Hugging Face's Trainer: `training_step` gives all losses to the optimizer.

    python examples/transformers_kd.py

The Trainer makes its own loss of one number and calls `accelerator.backward` with it; overriding `training_step`
replaces both. Its clipping finds no `.grad` and is switched off: `max_norm` of the optimizer clips. One process.
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
    """A Trainer whose step balances the task with a frozen teacher."""

    def __init__(self, *args: Any, teacher: nn.Module, **options: Any) -> None:
        super().__init__(*args, **options)
        self.teacher = teacher

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; returns the sum of its losses, for the log."""
        model.train()
        batch = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            losses = losses_of(model(batch["inputs"]), self.teacher(batch["inputs"]), batch["labels"])
        balanced = getattr(self.optimizer, "optimizer", self.optimizer)  # inside Accelerate's wrapper
        balanced.backward(losses, share=1 / self.current_gradient_accumulation_steps)
        return sum(losses.values()).detach() / self.current_gradient_accumulation_steps


def main(epochs: int = 12) -> float:
    """Train on random inputs that a random teacher labels; returns the student's accuracy."""
    torch.manual_seed(0)
    inputs, teacher = torch.randn(640, 64), nn.Linear(64, 10).requires_grad_(False)
    labels = teacher(inputs).argmax(1)
    student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = dk.DTOAdamW(student.parameters(), lr=1e-2, max_norm=1.0)
    # the Trainer calls model.zero_grad(), which does not reach the optimizer's gradient sets
    optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            max_grad_norm=0,
            lr_scheduler_type="cosine",
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = DistillationTrainer(
            student, options, train_dataset=Points(inputs, labels), optimizers=(optimizer, None), teacher=teacher
        )
        trainer.train()
    accuracy = float((student(inputs).argmax(1) == labels).double().mean())
    print(f"accuracy {accuracy:.3f}, last weights {[round(w, 3) for w in optimizer.balance.weights.tolist()]}")
    return accuracy


if __name__ == "__main__":
    main()
