"""Bytes and time of balanced steps on several ranks: measured here with gloo, and a model for more.

    python -m benchmarks.distributed            gloo processes: bytes against the model, times side by side
    python -m benchmarks.distributed model      analytic: bytes and seconds per step for 8 to 1024 GPUs

docs/distributed.md names the assumptions and shows both tables.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import report
from .record import Measurement, write

K = 2
WAYS = ("naive", "replicas", "sharded")
#: What is sent per rank and step, in units of (n - 1) / n times the bytes of the parameters.
UNITS = {"naive": 2 * K, "replicas": 2 * K, "sharded": K + 1}
#: Bytes per collective.
BUCKET = 25 * 2**20


def sent_bytes() -> int:
    """Payload that this process has sent over its TCP connections, as the kernel counts it (tcpi_bytes_acked)."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as s:
                if s.family in (socket.AF_INET, socket.AF_INET6) and s.type == socket.SOCK_STREAM:
                    total += struct.unpack_from("Q", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 120)[0]
        except OSError:  # closed meanwhile, or not connected
            continue
    return total


def _rank(rank: int, size: int, port: int, width: int, depth: int, steps: int, answers: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    import dtokd_kernels as dk

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    generator = torch.Generator().manual_seed(rank)
    x, y, t = (torch.randn(16, width, generator=generator) for _ in range(3))

    def way(name: str) -> tuple[Callable[[], None], int]:
        torch.manual_seed(0)
        layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
        model = nn.Sequential(*layers)
        optimizer = dk.DTOAdamW(model.parameters(), lr=1e-4)
        ddp = DistributedDataParallel(model)
        if name != "naive":
            dk.distributed.attach(optimizer, ddp, shard=name == "sharded")

        def losses() -> dict[str, Any]:
            out = ddp(x)
            return {"task": (out - y).square().mean(), "distill": (out - t).square().mean()}

        def balanced() -> None:
            optimizer.backward(losses())
            optimizer.step()
            optimizer.zero_grad()

        params = list(model.parameters())

        def naive() -> None:
            """DDP's own reduction, once per objective; then the step of one process."""
            values = losses()
            sets = optimizer._sets
            sets.source = optimizer._source
            for i, value in enumerate(values.values()):
                if i:
                    ddp.reducer.prepare_for_backward([])
                value.backward(retain_graph=i < K - 1)
                sets.grads.append([p.grad for p in params])
                for p in params:
                    p.grad = None
            sets.losses = torch.stack([value.detach().double() for value in values.values()])
            dist.all_reduce(sets.losses)
            sets.losses /= size
            sets.names, sets.params = tuple(values), list(params)
            optimizer.step()
            optimizer.zero_grad()

        if name == "naive":  # DDP rebuilds its buckets after the first iteration, which must have one pass only
            for _ in range(2):
                sum(losses().values()).backward()
            for p in params:
                p.grad = None
        return (naive if name == "naive" else balanced), sum(p.numel() * p.element_size() for p in params)

    runs = {name: way(name) for name in WAYS}
    for run, _ in runs.values():
        for _ in range(3):  # DDP rebuilds its buckets after the first
            run()
    sent: dict[str, list[int]] = {name: [] for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(steps):  # side by side, so that what slows the machine slows all of them
        for name, (run, _) in runs.items():
            dist.barrier()
            before, begin = sent_bytes(), time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
            dist.barrier()
            sent[name].append(sent_bytes() - before)
    answers.put((rank, sent, seconds, runs["naive"][1]))
    dist.barrier()
    dist.destroy_process_group()


def measure(size: int, width: int, depth: int, steps: int) -> list[Measurement]:
    """Each way to take a balanced step of two objectives, side by side.

    Args:
        size: how many processes.
        width: of a layer.
        depth: how many layers.
        steps: that are counted.

    Returns:
        Of each way "sent", bytes per rank, measured and as the model has them; "time" of the slowest rank and its
        "ratio" to "naive" in the same round, unless there are more processes than cores.
    """
    spawn = multiprocessing.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    answers = spawn.Queue()
    ranks = [spawn.Process(target=_rank, args=(r, size, port, width, depth, steps, answers)) for r in range(size)]
    for process in ranks:
        process.start()
    found = [answers.get(timeout=300) for _ in ranks]
    for process in ranks:
        process.join()
    slowest = {name: [max(times) for times in zip(*(f[2][name] for f in found), strict=True)] for name in WAYS}
    mode, numbers = f"{size} ranks", found[0][3]
    model = f"{numbers / 4e6:.1f} M float32 parameters"

    def of(way: str, metric: str, unit: str, values: list[float], evidence: str = "measured-cpu") -> Measurement:
        return Measurement("ranks", way, mode, metric, unit, model, values, 1, f"{steps} steps", evidence)

    results = []
    for name in WAYS:
        sent = [statistics.mean(values) / 1e6 for values in zip(*(f[1][name] for f in found), strict=True)]
        expected = UNITS[name] * (size - 1) / size * numbers / 1e6
        results += [of(name, "sent", "MB", sent), of(name, "model", "MB", [expected], "counted")]
        if size <= len(os.sched_getaffinity(0)):
            ratios = [a / b for a, b in zip(slowest[name], slowest["naive"], strict=True)]
            results += [of(name, "time", "ms", [1e3 * s for s in slowest[name]]), of(name, "ratio", "", ratios)]
    return results


@dataclass(frozen=True)
class Machine:
    """What the model assumes of a cluster.

    Attributes:
        inside: bytes per second and direction between GPUs of a node (NVLink, what a ring reaches).
        outside: bytes per second and direction of each GPU's share of the network.
        per_node: GPUs in a node.
        latency: seconds per hop of a ring.
        memory: bytes per second of a GPU's memory that a streaming kernel reaches.
    """

    inside: float = 300e9
    outside: float = 40e9
    per_node: int = 8
    latency: float = 8e-6
    memory: float = 2.5e12


def ring(n: int, size: float, machine: Machine) -> float:
    """Seconds of a reduce-scatter or all-gather of `size` bytes over n ranks in a ring; an all-reduce is two."""
    bandwidth = machine.inside if n <= machine.per_node else machine.outside
    return (n - 1) / n * size / bandwidth + (n - 1) * machine.latency


def modelled(n: int, parameters: float, backward: float, machine: Machine) -> dict[str, Any]:
    """Bytes and seconds that a balanced step adds to computation on n GPUs.

    Args:
        n: GPUs.
        parameters: their number; gradients of 2 bytes, state and update of `step` of 4.
        backward: seconds of one backward pass, which hides communication.
        machine: the cluster.

    Returns:
        For each way: "sent" bytes per rank; "exposed" seconds: what K passes do not hide, the all-gather, and
        reading and writing gradients, state and parameters in the step.
    """
    size = 2 * parameters
    count = max(1.0, size / BUCKET)
    scatter = count * ring(n, size / count, machine)
    hidden = K * backward * (1 - 1 / count)  # the last bucket of a pass comes when the pass is over
    # Gram and update read K gradients twice; update reads and writes two moments, a master copy and the parameter
    step = parameters * (2 * K * 2 + 2 * 3 * 4 + 2) / machine.memory
    small = ring(n, 88, machine) * 2
    averaged = max(K * 2 * scatter - hidden, K * 2 * scatter / count) + step + small
    times = {
        "naive": averaged,
        "replicas": averaged,
        "sharded": max(K * scatter - hidden, K * scatter / count) + scatter + step / n + small,
    }
    return {way: {"sent": UNITS[way] * (n - 1) / n * size, "exposed": times[way]} for way in WAYS}


def model_table(parameters: float = 86e6, backward: float = 0.06) -> str:
    """Markdown: `modelled` for 8 to 1024 GPUs."""
    lines = []
    for n in (8, 16, 32, 64, 128, 256, 512, 1024):
        ways = modelled(n, parameters, backward, Machine())
        cells = [f"{ways[w]['sent'] / 1e6:.0f} | {1e3 * ways[w]['exposed']:.1f}" for w in ("replicas", "sharded")]
        lines.append([str(n), *cells])
    return report.table("| GPUs | naive and `attach`, MB | ms | `shard=True`, MB | ms |", lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("measure", "model"), default="measure")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="processes, one group after the other")
    parser.add_argument("--width", type=int, default=1024, help="of a layer")
    parser.add_argument("--depth", type=int, default=8, help="layers")
    parser.add_argument("--steps", type=int, default=15, help="that are measured")
    parser.add_argument("--csv", type=Path, default=Path("runs/benchmarks/distributed.csv"), help="for the results")
    parser.add_argument("--parameters", type=float, default=86e6, help="of the model (ViT-B: 86e6)")
    parser.add_argument("--backward", type=float, default=0.06, help="seconds of one backward pass")
    args = parser.parse_args()
    if args.what == "model":
        print(f"{args.parameters:.3g} parameters, {1e3 * args.backward:.0f} ms per backward pass, {Machine()}\n")
        print(model_table(args.parameters, args.backward))
        return
    results = [m for ranks in args.ranks for m in measure(ranks, args.width, args.depth, args.steps)]
    print(report.ranks_table(write(args.csv, results)))


if __name__ == "__main__":
    main()
