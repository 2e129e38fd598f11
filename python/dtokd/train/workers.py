"""What each process that loads images does when it starts."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import torch

#: Seconds from one look at the main process to the next.
_LOOK = 0.5


def worker_seed(info: Any) -> int:
    """The seed that timm would choose, in a worker that leaves signals to the main process and does not outlive it.

    A terminal and torchrun send their signals to the main process's group. A main process that is killed (by kill -9,
    or for want of memory) cannot end its workers. Torch's own look at the parent process is not enough: a worker
    that has a batch to hand over then waits for room in a pipe which nobody reads any more.
    """
    os.setpgid(0, 0)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    return int(info.seed)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os._exit(1)
