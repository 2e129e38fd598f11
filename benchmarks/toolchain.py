"""NVIDIA's compilers and binary tools: where they are, and how the project's CUDA sources are compiled with them.

Nothing here needs a GPU. nvcc comes from PATH or CUDA_HOME; ptxas, cuobjdump and nvdisasm from nvcc's toolkit or, as
some packages of nvcc have none, from triton.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"
# rounded as written, so that every compiler and the emulation give the same bits
NVCC_FLAGS = ("-std=c++20", "-O3", "-fmad=false", f"-I{CSRC}", f"-I{CSRC / 'include'}")


class ToolError(RuntimeError):
    """A tool is missing or failed."""


def run(command: Sequence[str | Path]) -> str:
    """What a command prints, to either stream.

    Raises:
        ToolError: it failed; with what it printed.
    """
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ToolError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


@cache
def nvcc() -> Path | None:
    """The compiler, if there is one; the one on PATH may be a wrapper script."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else None
    found = found or shutil.which("nvcc")
    return Path(found) if found else None


@cache
def toolkit() -> Path | None:
    """The folder of nvcc's toolkit, as nvcc itself prints it."""
    compiler = nvcc()
    if compiler is None:
        return None
    # --dryrun prints the environment of its steps to stderr, TOP among it
    result = subprocess.run([compiler, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"(?m)^#\$ TOP=(.+)$", result.stderr)
    return Path(top[1]).resolve() if top else None


@cache
def binary_tool(name: str) -> Path | None:
    """ptxas, cuobjdump or nvdisasm."""
    folders = []
    top = toolkit()
    if top is not None:
        folders.append(top / "bin")
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def missing() -> str | None:
    """Why CUDA sources cannot be compiled and inspected here, or None."""
    if nvcc() is None:
        return "no nvcc on PATH or in CUDA_HOME"
    absent = [name for name in ("cuobjdump", "nvdisasm") if binary_tool(name) is None]
    return f"neither nvcc's toolkit nor triton has {' and '.join(absent)}" if absent else None


def compile_kernels(kernels: Sequence[str], folder: Path, arch: int, flags: Sequence[str] = ()) -> Path:
    """Compiles some instances of the kernel templates to PTX.

    Args:
        kernels: Such as "gram_kernel<float, 2>".
        folder: Where the files go.
        arch: Such as 90.
        flags: More of nvcc's.

    Returns:
        The file.

    Raises:
        ToolError: nvcc is missing or failed.
    """
    compiler = nvcc()
    if compiler is None:
        raise ToolError("no nvcc on PATH or in CUDA_HOME")
    source, output = folder / f"kernels_{arch}.cu", folder / f"kernels_{arch}.ptx"
    headers = "".join(f'#include "cuda/{path.name}"\n' for path in sorted(CSRC.glob("cuda/*.cuh")))
    addresses = "".join(f"    reinterpret_cast<const void*>(&{kernel}),\n" for kernel in kernels)
    source.write_text(
        f"{headers}using namespace dtokd;\nusing namespace dtokd::cuda;\n"
        f"extern const void* const kernels[] = {{\n{addresses}}};\n"
    )
    run([compiler, "-ptx", f"-arch=compute_{arch}", *NVCC_FLAGS, *flags, source, "-o", output])
    return output
