"""Which configuration an update kernel is launched in: the fastest on this GPU, found once.

Of an update kernel a configuration changes the speed and no bit, as every element is computed by itself. The kernels
of the Gram matrix are not tuned: the places of their additions, hence their bits, go with a fixed partition.

`triton.autotune` does not serve: a step is not idempotent, and it cannot restore tensors that a kernel reaches through
a table of addresses. So here configurations are timed on tensors made for that, never on the caller's.

NOTE [Tuning]: the first large update of a kind on a device compiles every configuration, and waits for the device: it
is the one exception to "no host sync". It allocates `SCRATCH_BYTES` for that, more for many lists or float64; where
memory is short, the default stays. Choices are kept in the process, and on disk next to triton's compiled kernels, for
later processes. Small updates and what the interpreter runs are never tuned; a stream that captures a CUDA graph takes
what was chosen before, or the default. DTOKD_AUTOTUNE=0: always the default.
"""

import ctypes
import hashlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import __version__
from .tables import CHUNK, INTERPRETED, Table, table_of


class Config(NamedTuple):
    """How an update kernel is compiled: warps of a program, and accesses of 16 bytes to each list in a loop's pass."""

    num_warps: int
    vectors: int


CONFIGS = (Config(8, 1), Config(4, 1), Config(4, 2), Config(16, 1))
DEFAULT = CONFIGS[0]
#: Elements of an update that is worth tuning: smaller ones take about as long as a launch.
ENOUGH = 2**20
#: Programs, at the least, of a launch that is timed: several waves on GPUs that hold some hundreds of them at a time.
PROGRAMS = 2048
#: Memory, at the least, of the lists that a configuration is timed on: more than an L2 cache holds (50 MB on an H100,
#: 126 MB on a B200), so nothing has to clear it. AdamW of float32 and two objectives has `PROGRAMS` chunks then.
SCRATCH_BYTES = 320 * 2**20
#: Launches of a configuration before those that are timed, and these.
WARM, TIMED = 5, 50

#: Launches a kernel in a configuration, on a table and the arguments after it.
Launch = Callable[[Config, Table, Sequence[Any]], None]

_chosen: dict[tuple[object, ...], Config] = {}


def choose(
    launch: Launch, table: Table, dtype: torch.dtype, args: Sequence[Any], kernel: Any, K: int, **flags: object
) -> Config:
    """The configuration for one launch; see NOTE [Tuning].

    Args:
        launch: launches the kernel.
        table: of the tensors that it will work on, whose dtype is `dtype`.
        args: what the kernel takes after the table; read for shapes and dtypes only.
        kernel, K, flags: the kernel and its variant. Nearby K share a choice.
    """
    if INTERPRETED or table.elements < ENOUGH or os.environ.get("DTOKD_AUTOTUNE") == "0":
        return DEFAULT
    name, K = kernel.__name__, triton.next_power_of_2(K)
    key = (table.numbers.device, name, dtype, K, *flags.items())
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return DEFAULT
        what = {flag: str(value) for flag, value in flags.items()}
        variant = {**machine(table.numbers.device), "kernel": name, "dtype": str(dtype), "K": K, **what}
        _chosen[key] = _read(variant) or _fastest(variant, launch, table, dtype, args)
    return _chosen[key]


def machine(device: torch.device) -> dict[str, str]:
    """What a choice depends on besides the variant: another GPU, driver, triton or version of the kernels."""
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "triton": triton.__version__,
        "dtokd_kernels": __version__,
    }


def measure(launch: Launch, table: Table, dtype: torch.dtype, args: Sequence[Any]) -> list[float]:
    """Milliseconds of a launch in each of `CONFIGS`, on as many lists as the table has, of one tensor each.

    The tensors hold ordinary numbers: roots and quotients of 0 and of others take different paths. Its tensor arguments
    are replaced: no coefficient is 0, which would skip a gradient, and no step is skipped.
    """
    device = table.numbers.device
    rows = table.numbers.shape[0] - 3 - table.counted - table.grouped
    size = max(PROGRAMS, SCRATCH_BYTES // (rows * dtype.itemsize * CHUNK)) * CHUNK
    generator = torch.Generator(device).manual_seed(0)  # the caller's stays as it is
    lists = torch.rand(rows, size, generator=generator, dtype=dtype, device=device).add_(0.5)
    counter = torch.zeros(int(table.counted), dtype=torch.float64, device=device)  # in float32 it is 0 as well
    scratch = table_of([[row] for row in lists.unbind()], counter.unbind(), (0,) if table.grouped else ())
    replaced = [_harmless(a) if isinstance(a, Tensor) else a for a in args]
    return [_milliseconds(lambda c=config: launch(c, scratch, replaced)) for config in CONFIGS]  # type: ignore[misc]


def _milliseconds(run: Callable[[], None]) -> float:
    """Median time of a launch. Others are queued before it, so the host's share of a launch does not count."""
    for _ in range(WARM):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairwise(events))


def _harmless(argument: Tensor) -> Tensor:
    return torch.full_like(argument, 0.5) if argument.is_floating_point() else torch.zeros_like(argument)


def _fastest(
    variant: dict[str, object], launch: Launch, table: Table, dtype: torch.dtype, args: Sequence[Any]
) -> Config:
    try:
        milliseconds = measure(launch, table, dtype, args)
    except torch.OutOfMemoryError:
        return DEFAULT
    config = CONFIGS[milliseconds.index(min(milliseconds))]
    _write(variant, config)
    return config


@cache
def _driver() -> str:
    """The newest CUDA that the driver knows, as it counts: 13000 is 13.0."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return "unknown"
    return str(version.value)


def _path(variant: dict[str, object]) -> Path:
    """The file of one choice: processes that tune different variants at a time do not meet."""
    digest = hashlib.sha256(json.dumps(variant).encode()).hexdigest()
    return Path(triton.knobs.cache.dir) / "dtokd_kernels" / f"{digest}.json"


def _read(variant: dict[str, object]) -> Config | None:
    """The choice on disk, if there is one, whole and for this very variant."""
    try:
        found = json.loads(_path(variant).read_text())
        config = Config(*found["config"])
        return config if found["variant"] == variant and config in CONFIGS else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(variant: dict[str, object], config: Config) -> None:
    """Leave the choice to later processes, in one step: none sees half a file. A disk that takes none is no error."""
    path = _path(variant)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with open(handle, "w") as file:
            json.dump({"variant": variant, "config": config}, file)
        os.replace(name, path)
    except OSError:
        pass
