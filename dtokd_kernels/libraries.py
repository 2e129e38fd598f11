"""The libraries in C++, one for the CPU and one for CUDA: loads them, and remembers why one could not be loaded."""

from __future__ import annotations

import mmap
import re
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

import torch

from . import operations
from ._version import built_from

operations.define("dtokd")


def _load(name: str, needs: str) -> str | None:
    """Load a library that lies beside this file; warn of one that is there and cannot be used.

    Args:
        name: of the library, such as "_C".
        needs: what building it takes, for the reason.

    Returns:
        Why it cannot be used, or None.
    """
    package = Path(__file__).parent
    # beside this file only: an editable install elsewhere would offer its own
    spec = PathFinder.find_spec(f"{__package__}.{name}", [str(package)])
    if spec is None or spec.origin is None:
        return f"it was not built (no torch or no {needs} when the package was installed, or DTOKD_BUILD excludes it)"
    remedy = "build it again (`python setup.py build_ext --inplace` in a checkout) or install the package again"
    built, expected = version_of(Path(spec.origin)), built_from(package.parent / "csrc")
    if built != expected and built.partition("+")[0] != expected:  # an install has no sources to compare with
        reason = f"{spec.origin} was built from version {built}, but the files beside it are {expected}: {remedy}"
    else:
        try:
            torch.ops.load_library(spec.origin)
            return None
        except OSError as error:
            reason = f"its library does not load ({error.__cause__ or error}): {remedy}"
    warnings.warn(f"dtokd_kernels runs without its extension: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def version_of(library: Path) -> str:
    """What a library was built from, as csrc/torch/version.cpp writes it; read without loading the library."""
    with library.open("rb") as file:
        if not library.stat().st_size:  # an empty file has no map
            return "unknown"
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            mark = re.search(rb"dtokd-version:([^\0]*)\0", content)
            return mark[1].decode() if mark else "unknown"


#: Why the library of a device cannot be used, or None. That of CUDA loads without a GPU too.
missing: dict[str, str | None] = {"cpu": _load("_C", "C++ compiler"), "cuda": _load("_cuda", "nvcc")}


def instructions() -> str:
    """The vector instructions that the CPU kernels use on this machine."""
    if missing["cpu"] is not None:
        return "none"
    return bytes(torch.ops.dtokd.instructions.default(torch.empty(0, device="cpu")).tolist()).decode()
