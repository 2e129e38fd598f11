"""Translated PTX as a shared library, its kernels launched from Python."""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from .translator import translate_module

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
# rounded as written: a compiler must not fuse what PTX keeps apart. A negative number is the bits it has.
FLAGS = ("-std=c++20", "-O1", "-ffp-contract=off", "-Wno-overflow", "-shared", "-fPIC", f"-I{HERE}", f"-I{CSRC}")


def compile_ptx(ptx: str, name: str, folder: Path) -> Path:
    """Translates PTX and compiles it; returns the shared library."""
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(translate_module(ptx, f"{name}.ptx"))
    command = ["g++", *FLAGS, source, HERE / "interface.cpp", "-o", library]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return library


class Library:
    """The kernels of a PTX file."""

    def __init__(self, ptx: str, name: str, folder: Path):
        self._launch = ctypes.CDLL(str(compile_ptx(ptx, name, folder))).ptx_launch
        self._launch.restype = ctypes.c_char_p

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence,
        *,
        shared_bytes: int = 0,
        cooperative: bool = False,
        schedule: str = "forward",
    ) -> None:
        """Runs a kernel to its end.

        Args:
            kernel: Its name in PTX.
            grid: Blocks in up to three dimensions.
            block: Threads.
            arguments: A tensor for a pointer, None for a null one, ctypes values for all else.
            shared_bytes: Dynamic shared memory.
            cooperative: All blocks are alive together.
            schedule: As in csrc/tests/emulation/schedule.h.

        Raises:
            RuntimeError: with the emulation's message, if the kernel made a mistake.
        """
        values = [_value(a) for a in arguments]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        error = self._launch(
            kernel.encode(),
            (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid))),
            (ctypes.c_uint * 3)(*block, *[1] * (3 - len(block))),
            ctypes.c_size_t(shared_bytes),
            ctypes.c_bool(cooperative),
            addresses,
            schedule.encode(),
        )
        if error is not None:
            raise RuntimeError(error.decode())


def _value(argument):
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, torch.Tensor) else argument
