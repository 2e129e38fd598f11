"""Processes with gloo that wait for work: torch takes seconds to import, so a module of tests starts them once."""

import importlib
import multiprocessing
import os
import socket
import traceback
from datetime import timedelta


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank, size, port, pipe, timeout) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    while (work := pipe.recv()) is not None:
        module, name, args = work
        try:
            torch.manual_seed(0)
            answer = getattr(importlib.import_module(module), name)(rank, size, *args)
            pipe.send((True, answer))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    """`size` ranks of one process group."""

    def __init__(self, size: int, timeout: float = 60) -> None:
        self.size = size
        spawn = multiprocessing.get_context("spawn")
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, size, port, theirs, timeout), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, work, *args):
        """work(rank, size, *args) on all ranks; their answers in order. It must be a function of a module."""
        for pipe in self.pipes:
            pipe.send((work.__module__, work.__name__, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(120):
                raise TimeoutError(f"rank {rank} of {self.size} did not finish {work.__name__}{args}")
            answers.append(pipe.recv())
        failed = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(answers) if not good]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
