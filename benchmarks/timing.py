"""Timing on a machine that others use too."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from .cases import SLOW, UNIT, Competitor

T = TypeVar("T")
PROBE_BYTES = 256 * 1024 * 1024
WARM_UP = 0.02  # seconds, and one step at least


class Quiet:
    """Runs things while other processes leave the processor alone.

    Args:
        limit: how many cores others may use; a run in which they used more is waited out and repeated. None: any.
    """

    #: Seconds over which the load is observed before a run; the kernel counts it in ticks of 10 ms.
    WINDOW = 0.3

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit
        self._busy = 0.0
        self._seconds = 0.0

    def run(self, action: Callable[[], T]) -> T:
        """The result of the first run that was not disturbed."""
        while True:
            while self.limit is not None and self._observe(lambda: time.sleep(self.WINDOW))[1] > self.limit:
                pass
            start = time.perf_counter()
            result, load = self._observe(action)
            if self.limit is None or load <= self.limit:
                seconds = time.perf_counter() - start
                self._busy += load * seconds
                self._seconds += seconds
                return result

    @property
    def load(self) -> float:
        """Cores that others used in the runs that counted."""
        return self._busy / max(self._seconds, 1e-9)

    @staticmethod
    def _observe(action: Callable[[], T]) -> tuple[T, float]:
        """The result, and how many cores others used meanwhile."""
        busy, start = _busy_seconds_of_others(), time.perf_counter()
        result = action()
        return result, max(0.0, _busy_seconds_of_others() - busy) / (time.perf_counter() - start)


def _busy_seconds_of_others() -> float:
    """Processor time that all but this process have used since the machine started; Linux only."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


@dataclass(frozen=True)
class Sample:
    """Seconds of one step, and of the unit's step in the same round."""

    seconds: float
    unit: float


def time_rounds(
    competitors: Mapping[str, Competitor], rounds: int, slow_rounds: int, quiet: Quiet
) -> dict[str, list[Sample]]:
    """Time every competitor, interleaved.

    A round runs the fast ones, or the unit and a slow one; rounds and their members are in random order. Each timed
    step comes after warm-up steps of its own, so that the caches hold what its last step left there.
    """
    schedule = [[name for name in competitors if name not in SLOW] for _ in range(rounds)]
    schedule += [[UNIT, name] for name in competitors if name in SLOW for _ in range(slow_rounds)]
    shuffle = random.Random(0)
    shuffle.shuffle(schedule)
    samples: dict[str, list[Sample]] = {name: [] for name in competitors}
    with _no_garbage_collection():
        for members in schedule:
            shuffle.shuffle(members)
            times = quiet.run(lambda names=members: [_warm_seconds(competitors[name]) for name in names])  # type: ignore[misc]
            unit = times[members.index(UNIT)]
            for name, seconds in zip(members, times, strict=True):
                samples[name].append(Sample(seconds, unit))
    return samples


def read_bandwidth(threads: int, quiet: Quiet) -> dict[str, Sequence[float]]:
    """GB/s at which torch reads a buffer that fits no cache, and reads and writes it in place."""
    torch.set_num_threads(threads)
    buffer = torch.ones(PROBE_BYTES // 4)

    def probe() -> dict[str, Sequence[float]]:
        return {
            "read (torch.sum)": [PROBE_BYTES / 1e9 / seconds_of(buffer.sum) for _ in range(7)],
            "read and write in place (mul_)": [
                2 * PROBE_BYTES / 1e9 / seconds_of(lambda: buffer.mul_(1.0)) for _ in range(7)
            ],
        }

    return quiet.run(probe)


def seconds_of(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _warm_seconds(competitor: Competitor) -> float:
    start = time.perf_counter()
    while True:
        competitor.prepare()
        competitor.step()
        if time.perf_counter() - start > WARM_UP:
            break
    competitor.prepare()
    return seconds_of(competitor.step)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
