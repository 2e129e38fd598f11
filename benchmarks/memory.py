"""Extra memory of one step: how far the process's resident memory rises above where it was before the step."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from .cases import COMPETITORS, Case, Competitor, Shapes

#: Competitors whose inputs are as in training, where nothing else holds on to them. (TorchJD's Jacobians are kept
#: here, for the next round; in training they are freed inside the step.)
MEASURED = ("fused", "clip_fused", "dtokd", "foreach_fused", "foreach")

# glibc's mallopt: blocks from 64 KiB on are mapped, and so returned when freed; else memory left over from an
# earlier step would be used again unseen
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MMAP_THRESHOLD = 64 * 1024


def peak_extra_bytes(shapes: Shapes, names: Sequence[str] = MEASURED) -> dict[str, int]:
    """What each competitor's step needs at its peak beyond parameters, state and both gradients.

    Measured in a fresh process, after two steps, from the kernel's high-water mark of resident memory, which sees
    every allocation, to 0.2 MB or so. Linux and glibc only.

    Returns:
        Bytes by competitor.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, shapes, names).result()


def _measure(shapes: Shapes, names: Sequence[str]) -> dict[str, int]:
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, 0)
    case = Case.build(shapes, "interior")
    return {name: _rise(COMPETITORS[name](case), libc) for name in names}


def _rise(competitor: Competitor, libc: ctypes.CDLL) -> int:
    for _ in range(2):
        competitor.prepare()
        competitor.step()
    competitor.prepare()
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    before = _high_water_mark()
    competitor.step()
    return _high_water_mark() - before


def _high_water_mark() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
