"""`--dry-run`: some iterations of a run, to see that they work, what memory they need and how long an epoch takes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from ..datafree.options import BESIDES
from ..stopwatch import Stopwatch
from .data import Data
from .engine import Engine
from .images import skipped
from .progress import duration
from .rundir import RunDir

#: Iterations that warm up, and those that are timed; batches of the validation split likewise.
WARM, TIMED = 2, 6


class _First:
    """The first batches of a loader, which is begun anew for each pass."""

    def __init__(self, loader: Any, count: int) -> None:
        self._loader, self._count = loader, min(count, len(loader)) if hasattr(loader, "__len__") else count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._loader), self._count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def rehearse(engine: Engine, loaders: Data, run: RunDir) -> None:
    """Train and judge some batches, and tell what they cost; the run's directory is left as it was.

    Args:
        engine: of the run. Its student and optimizer change, so it is of no use after that.
        loaders: of the run.
        run: the directory.

    Raises:
        UsageError: as a run would.
    """
    say, noted = engine.progress.say, run.bad_images.read_bytes() if run.bad_images.exists() else None
    on_gpu = engine.device.type == "cuda"
    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(engine.device)
        engine.train_epoch(_First(loaders.train, WARM), 0)
        timed, made = _First(loaders.train, TIMED), loaders.synthetic
        if made is not None:
            made.watch = Stopwatch(engine.device)
        start = time.monotonic()
        engine.train_epoch(timed, 0)  # its last line waits for the device
        each, before = (time.monotonic() - start) / len(timed), 0.0
        if made is not None:  # images are made in some iterations only, in more of these than of an epoch's
            making = made.watch.take() / made.makings(len(timed))
            before = made.warmup * making
            each += (made.makings(len(made)) / len(made) - made.makings(len(timed)) / len(timed)) * making
        share = min(engine.teacher_seconds / len(timed) / each, 1)
        size = engine.options.batch_size * engine.world.size
        besides = "" if made is None else BESIDES
        of_teacher = f", of which the teacher takes {share:.0%}{besides}" if share else ""
        say(f"dry run: an iteration of {size} images takes {each:.3g} s{of_teacher}; {size / each:.3g} img/s")
        epoch = each * len(loaders.train)
        told = f"{len(loaders.train)} iterations"
        if loaders.validation is not None:
            engine.evaluate(_First(loaders.validation, 1))
            some = _First(loaders.validation, TIMED)
            start = time.monotonic()
            engine.evaluate(some)
            epoch += (time.monotonic() - start) / len(some) * len(loaders.validation)
            told += f" and {len(loaders.validation)} batches of validation"
        epochs = engine.progress.epochs
        whole = duration(before + epoch * epochs)
        first = f" with the first images, which take {duration(before)}" if made is not None else ""
        say(f"dry run: an epoch ({told}) takes about {duration(epoch)}, {epochs} epochs {whole}{first}")
        say(f"dry run: {_memory(engine.device)}; nothing was written")
        for line in skipped(run.bad_images):
            say(f"dry run: skipped image: {line}")
    finally:
        if engine.world.first:
            if noted is None:
                run.bad_images.unlink(missing_ok=True)
            else:
                run.bad_images.write_bytes(noted)


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        most, there = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
        return f"at most {most / 2**30:.3g} of {there / 2**30:.3g} GiB of the device's memory are used"
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"at most {most / 2**30:.3g} GiB of memory are used, without processes that load images"
