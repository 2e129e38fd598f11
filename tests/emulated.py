"""The CUDA backend on CPU tensors: the package's own bindings and kernels, compiled for the emulation of CUDA.

`python -m tests.emulated FOLDER` compiles them there, for several runs of the tests.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from benchmarks.kernels import FLOAT64
from dtokd_kernels import backends, implementations, operations
from dtokd_kernels._version import built_from
from dtokd_kernels.implementations import TICKETS, Kernels

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-x", "c++", "-DDTOKD_EMULATION"]
FLAGS += [f'-DDTOKD_VERSION="{built_from(ROOT / "csrc")}"']
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-I", str(ROOT / "csrc"), "-I", str(ROOT / "csrc/include")]


def sums_of_the_device() -> list[str]:
    """The flag by which the emulation takes sums as code for the GPU here does, or none."""
    if not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability()
    return [f"-DDTOKD_SUMS_IN_PARTS={int(10 * major + minor not in FLOAT64)}"]


def build(folder: Path, *more: str) -> Path:
    """Compile the sources of the CUDA extension with a C++ compiler and more flags; the library's path."""
    more = (*sums_of_the_device(), *more)
    folder.mkdir(parents=True, exist_ok=True)
    listed = (ROOT / "csrc/sources.txt").read_text().splitlines()
    lines = (line.split() for line in listed if line[:1] not in ("", "#"))
    sources = [ROOT / "csrc" / path for kind, path in lines if kind in ("cuda", "torch-cuda")]
    headers = [flag for path in include_paths() for flag in ("-isystem", path)]

    def run(*command: str | Path) -> None:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    with ThreadPoolExecutor(2) as pool:
        objects = [folder / f"{source.name}.o" for source in sources]
        list(pool.map(lambda s, o: run("g++", *FLAGS, *more, *headers, "-c", s, "-o", o), sources, objects))
    library = folder / "dtokd_emulated.so"
    places = [flag for path in library_paths() for flag in ("-L", path)]
    run("g++", "-shared", *objects, "-o", library, *places, "-ltorch", "-ltorch_cpu", "-lc10")
    return library


def fail_after(library: Path, launches: int) -> None:
    """So many launches succeed, and the next fails; those after it succeed."""
    ctypes.CDLL(str(library)).dtokd_fail_after(launches)


@contextmanager
def emulated_cuda(library: Path, device: str = "cpu") -> Iterator[Kernels]:
    """Inside, backend "cuda" is there and takes CPU tensors; or those that say they are on `device`."""
    if not hasattr(torch.ops.dtokd_emulated, "gram"):
        operations.define("dtokd_emulated")
        torch.ops.load_library(str(library))
    held, key, home = implementations._tickets, (-1, 0), device

    def tickets(device: torch.device | None) -> torch.Tensor | None:
        """Those of the only stream."""
        if key not in held:
            held[key] = torch.zeros(TICKETS, dtype=torch.int32, device=home)
        return held[key]

    kernels = Kernels("cuda", "dtokd_emulated", mixed=True, resident=True, device_lr=True)
    before = implementations.tickets, backends._BACKENDS["cuda"]
    implementations.tickets = tickets
    backends._BACKENDS["cuda"] = backends.Backend(lambda: kernels, device, lambda: None)
    try:
        yield kernels
    finally:
        implementations.tickets, backends._BACKENDS["cuda"] = before
        if (left := held.pop(key, None)) is not None:
            assert not getattr(left, "host", left).any()  # every launch leaves them as it found them


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), *sys.argv[2:]))
