"""A training script for torchrun: in its first life rank 1 is killed while it saves the third checkpoint."""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import dtokd_kernels as dk

STEPS, DIES_AT = 5, 3


def newest(folder):
    return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)


def save(folder, step, model, optimizer, dies) -> None:
    """Under a name of its own until all ranks have written, so that what has a number is whole."""
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    partial = folder / f"{step}.partial"
    if dies:
        partial.mkdir(exist_ok=True)
        (partial / "half").write_text("written")
        os.kill(os.getpid(), signal.SIGKILL)
    dcp.save(states, checkpoint_id=partial)
    if dist.get_rank() == 0:
        os.replace(partial, folder / str(step))
    dist.barrier()


def main() -> None:
    folder, shard, lives = Path(sys.argv[1]), sys.argv[2] == "shard", int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    optimizer = dk.DTOAdamW(net.parameters(), lr=0.01)
    model = DistributedDataParallel(net)
    dk.distributed.attach(optimizer, model, shard=shard)
    begin = newest(folder)
    if begin:
        model_state, optimizer_state = get_state_dict(net, optimizer)
        states = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(states, checkpoint_id=folder / str(begin))
        set_state_dict(net, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    print(f"life {lives} rank {rank} begins after step {begin}", flush=True)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4 * size, 4, dtype=torch.float64, generator=generator) for _ in range(STEPS)]
    try:
        for step in range(begin + 1, STEPS + 1):
            out = model(batches[step - 1][rank * 4 : rank * 4 + 4])
            optimizer.backward({"task": out.square().mean(), "distill": (out - 1).square().mean()})
            optimizer.step()
            optimizer.zero_grad()
            save(folder, step, net, optimizer, dies=rank == 1 and lives == 0 and step == DIES_AT)
    except RuntimeError as error:
        print(f"life {lives} rank {rank} stopped: {type(error).__name__}", flush=True)
        raise
    if rank == 0:
        torch.save([p.detach() for p in net.parameters()], folder / "weights.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
