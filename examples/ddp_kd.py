"""Distillation on several ranks: DistributedDataParallel and one line more.

    torchrun --nproc-per-node 2 examples/ddp_kd.py

Each rank has other samples; `attach` averages the gradients of every loss, so that all ranks take the same step. Here
with gloo on CPUs; on GPUs initialise "nccl" and move model and data to the rank's device.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dtokd_kernels as dk

CLASSES, FEATURES, TEMPERATURE = 10, 64, 4.0


def network(width: int) -> nn.Module:
    """A small classifier."""
    return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))


def points() -> tuple[Tensor, Tensor]:
    """Inputs around ten centres, and the number of each one's centre."""
    labels = torch.arange(640) % CLASSES
    return torch.randn(CLASSES, FEATURES)[labels] + 2 * torch.randn(len(labels), FEATURES), labels


def trained_teacher(inputs: Tensor, labels: Tensor) -> nn.Module:
    """A wider network, trained on the labels and frozen."""
    teacher = network(128)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(30):
        F.cross_entropy(teacher(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return teacher.requires_grad_(False)


def losses_of(logits: Tensor, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The task's loss and the distance to the teacher's softened predictions."""
    soft, wanted = (t.log_softmax(1) for t in (logits / TEMPERATURE, target / TEMPERATURE))
    distill = F.kl_div(soft, wanted, reduction="batchmean", log_target=True)
    return {"task": F.cross_entropy(logits, labels), "distill": distill}


def main(epochs: int = 6) -> float:
    """Train on points around ten centres; returns the student's accuracy."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same data and networks on all ranks
    inputs, labels = points()
    teacher, student = trained_teacher(inputs, labels), network(16)
    optimizer = dk.DTOAdamW(student.parameters(), lr=1e-2, max_norm=1.0)
    model = DistributedDataParallel(student)
    dk.distributed.attach(optimizer, model)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).chunk(20):
            mine = batch[rank::size]
            optimizer.backward(losses_of(model(inputs[mine]), teacher(inputs[mine]), labels[mine]))
            optimizer.step()
            optimizer.zero_grad()
    accuracy = float((student(inputs).argmax(1) == labels).double().mean())
    if rank == 0:
        print(f"accuracy {accuracy:.3f} on {size} ranks")
    dist.destroy_process_group()
    return accuracy


if __name__ == "__main__":
    main()
