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

TEMPERATURE = 4.0


def losses_of(logits: Tensor, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The task's loss and the distance to the teacher's softened predictions."""
    soft, wanted = (t.log_softmax(1) for t in (logits / TEMPERATURE, target / TEMPERATURE))
    distill = F.kl_div(soft, wanted, reduction="batchmean", log_target=True)
    return {"task": F.cross_entropy(logits, labels), "distill": distill}


def main(epochs: int = 6) -> float:
    """Train on random inputs that a random teacher labels; returns the student's accuracy."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same data and networks on all ranks
    inputs, teacher = torch.randn(640, 64), nn.Linear(64, 10).requires_grad_(False)
    labels = teacher(inputs).argmax(1)
    student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
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
