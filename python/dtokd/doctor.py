"""What is installed and which implementation of the balanced step runs."""

from __future__ import annotations

import platform

import timm
import torch

import dtokd_kernels as dk


def run() -> int:
    """Print it, one fact a line."""
    facts = {
        "dtokd_kernels": dk.__version__,
        **dk.backend_info(),
        "timm": timm.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
    for name, value in facts.items():
        print(f"{name:16} {value}")
    return 0
