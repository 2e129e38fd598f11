"""Refuses what the package does not run with. The package imports this file first; setup.py runs it by itself."""

import sys

PYTHON = (3, 10)
TORCH = (2, 10)  # the first whose stable ABI takes lists of tensors


def _refuse_unsupported() -> None:
    """Import torch and look at the versions.

    Raises:
        ImportError: Python or torch is too old, or there is no torch; with what to install.
    """
    if sys.version_info < PYTHON:
        found = "{}.{}".format(*sys.version_info)
        raise ImportError(f"dtokd-kernels needs Python 3.10 or newer, this is {found}: install it for a newer Python")
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError("dtokd-kernels needs torch, which is not installed: pip install 'torch>=2.10'") from None
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < TORCH:
        raise ImportError(
            f"dtokd-kernels needs torch 2.10 or newer, this is {torch.__version__}: pip install 'torch>=2.10'"
        )


_refuse_unsupported()
