"""How long a part of each step takes on its device, without waiting for it in between."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Adds up the time inside its `with` blocks: on a GPU by events in the stream, elsewhere by the host's clock.

    Args:
        device: where the work is done.

    Example:
        >>> watch = Stopwatch(torch.device("cpu"))
        >>> with watch:
        ...     _ = torch.ones(3).sum()
        >>> watch.take() > 0, watch.take()
        (True, 0.0)
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._kept: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *error: object) -> None:
        self._kept.append((self._start, self._now()))

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        kept, self._kept = self._kept, []
        if not self._events:
            return float(sum(end - start for start, end in kept))
        if kept:
            kept[-1][1].synchronize()
        return float(sum(start.elapsed_time(end) for start, end in kept)) / 1000
