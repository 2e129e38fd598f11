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
FLAGS = ("-std=c++20", "-O1", "-ffp-contract=off", "-Wno-overflow", f"-I{HERE}", f"-I{CSRC}")
LIBRARY = ("-shared", "-fPIC")


def compile_ptx(ptx: str, name: str, folder: Path, *flags: str | Path) -> Path:
    """Translates PTX and compiles it; returns the shared library, or what the flags make of it."""
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(translate_module(ptx, f"{name}.ptx"))
    command = ["g++", *FLAGS, *(flags or LIBRARY), source, HERE / "interface.cpp", "-o", library]
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


class Program:
    """The kernels of triton's PTX under the thread sanitizer, which takes a process of its own for each launch.

    It watches global memory. In shared memory triton has several lanes store one value to one place.
    """

    def __init__(self, ptx: str, name: str, folder: Path):
        self._file = folder / f"{name}.memory"
        flags = ("-g1", "-fsanitize=thread", "-DDTOKD_UNWATCHED_SHARED", HERE / "program.cpp")
        self._program = compile_ptx(ptx, name, folder, *flags)

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence,
        memory: Sequence[torch.Tensor],
        *,
        shared_bytes: int = 0,
    ) -> None:
        """Runs a kernel to its end, as `Library.launch`.

        Args:
            kernel, grid, block, arguments, shared_bytes: as there.
            memory: all contiguous tensors that arguments of int64 hold addresses of; they are written to.

        Raises:
            RuntimeError: with what the sanitizer or the emulation says.
        """
        blocks = list(
            {t.data_ptr(): t for t in [*memory, *(a for a in arguments if isinstance(a, torch.Tensor))]}.values()
        )
        numbers = [len(blocks)]
        data = b"".join(map(_bytes, numbers))
        for t in blocks:
            raw = t.flatten().view(torch.uint8).numpy().tobytes()
            data += _bytes(t.data_ptr() % 64) + _bytes(len(raw)) + raw
        places = [place for i, t in enumerate(blocks) if t.dtype == torch.int64 for place in _addresses(i, t, blocks)]
        numbers = [len(places), *(number for place in places for number in place), len(arguments)]
        index = {t.data_ptr(): i for i, t in enumerate(blocks)}
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                numbers += [index[argument.data_ptr()], 0]
            else:
                bits = b"" if argument is None else bytes(argument)
                numbers += [2**64 - 1, int.from_bytes(bits, "little")]
        numbers += [*grid, *[1] * (3 - len(grid)), *block, *[1] * (3 - len(block)), shared_bytes]
        self._file.write_bytes(data + b"".join(map(_bytes, numbers)))
        command = [self._program, self._file, kernel]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(result.stderr)
        left = memoryview(bytearray(self._file.read_bytes()))
        for t in blocks:
            if t.numel():
                size = t.numel() * t.itemsize
                t.flatten().view(torch.uint8).copy_(torch.frombuffer(left[:size], dtype=torch.uint8))
                left = left[size:]


def _bytes(number: int) -> bytes:
    return number.to_bytes(8, "little")


def _addresses(index: int, numbers: torch.Tensor, blocks: Sequence[torch.Tensor]) -> list[tuple[int, int, int, int]]:
    """Places in a tensor of int64 that hold addresses: (its block, bytes before, block pointed to, bytes before)."""
    found = []
    for i, number in enumerate(numbers.flatten().tolist()):
        for target, t in enumerate(blocks):
            if t.data_ptr() <= number < t.data_ptr() + t.numel() * t.itemsize:
                found.append((index, 8 * i, target, number - t.data_ptr()))
    return found


def _value(argument):
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, torch.Tensor) else argument
