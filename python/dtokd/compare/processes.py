"""Several runs at a time, each a `dtokd train` in a process of its own, on the GPUs in turn."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import torch
import yaml

from ..errors import Diverged, UsageError
from ..train.options import plain
from ..train.signals import signals
from .kinds import detects
from .plan import Run

#: Between two looks at the processes, in seconds.
_PAUSE = 0.2
_ERROR = re.compile(r"dtokd \w+: error: ")


def gpus(options: argparse.Namespace) -> list[str]:
    """The GPUs that runs may have, as CUDA_VISIBLE_DEVICES names them; none where `--device` is not plain cuda."""
    if options.device != "cuda" or not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def train_in_processes(
    runs: Sequence[Run], jobs: int, devices: Sequence[str], done: Callable[[Run, Diverged | None], None]
) -> int:
    """Train them; what they print goes into `log_of` each.

    Args:
        runs: those that are not finished.
        jobs: how many at a time.
        devices: of `gpus`.
        done: called for each run that has ended, with its divergence.

    Returns:
        The number of the signal with which the user wants out, after which the processes have saved; or 0.

    Raises:
        UsageError: a process has ended in another way; the others were ended, and have saved.
    """
    waiting, running = list(runs), dict[int, tuple[Run, subprocess.Popen[bytes], IO[bytes]]]()
    stopped = 0
    with signals() as noted:
        try:
            while (waiting and not stopped) or running:
                while waiting and not stopped and len(running) < jobs:
                    slot = next(i for i in range(jobs) if i not in running)
                    running[slot] = _start(waiting.pop(0), jobs, devices[slot % len(devices)] if devices else None)
                if noted[0] and not stopped:
                    stopped = noted[0]
                    _end([process for _, process, _ in running.values()])
                for slot, (run, process, log) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[slot]
                    log.close()
                    if not stopped or process.returncode == 0:
                        done(run, _outcome(run, process.returncode))
                time.sleep(_PAUSE)
        except BaseException:
            left = [process for _, process, _ in running.values()]
            _end(left)
            for process in left:
                process.wait()
            raise
        finally:
            for _, _, log in running.values():
                log.close()
    return stopped


def log_of(run: Run) -> Path:
    """What a run in a process of its own has printed."""
    return run.path.with_name(f"{run.path.name}.log")


def _start(run: Run, jobs: int, device: str | None) -> tuple[Run, subprocess.Popen[bytes], IO[bytes]]:
    changes = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    log_of(run).parent.mkdir(parents=True, exist_ok=True)
    log = log_of(run).open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "dtokd", "detect" if detects(run.options) else "train", "--config", "/dev/stdin"],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**threads, **os.environ, **changes},
        start_new_session=True,  # a terminal's Ctrl-C is ours to pass on
    )
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(yaml.safe_dump(plain(run.options), sort_keys=False).encode())
    return run, process, log


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)


def _outcome(run: Run, code: int) -> Diverged | None:
    """Raises UsageError: it has ended in another way than training does."""
    if code == 0:
        return None
    lines = log_of(run).read_text(encoding="utf-8", errors="replace").splitlines()
    told = next((line[found.end() :] for line in reversed(lines) if (found := _ERROR.match(line))), None)
    if code == 1 and told is not None:
        return Diverged(told)
    if code == 2 and told is not None:
        raise UsageError(f"{run.arm} with seed {run.seed}: {told}")
    how = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with exit code {code}"
    memory = "; it may have had too little memory: try fewer --jobs" if code == -signal.SIGKILL else ""
    raise UsageError(
        f"--jobs: the process of {run.arm} with seed {run.seed} was ended {how}{memory}; {log_of(run)} has what it "
        "printed; the finished runs are kept, and the same command goes on"
    )
