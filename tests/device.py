"""Where the tests run: on the CPU, or with DTOKD_TEST_DEVICE=cuda the very same cases on a GPU (`make gpu`)."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

DEVICE = torch.device(os.environ.get("DTOKD_TEST_DEVICE", "cpu"))


class _TensorsOn(TorchFunctionMode):
    """Functions that make tensors make them on `device`.

    Random numbers of a CPU generator are drawn on the CPU first, so that they are the same everywhere.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device != self.device:
            return func(*args, **{**kwargs, "device": generator.device}).to(self.device)
        return func(*args, **{**kwargs, "device": self.device})


def put_tensors_on_device() -> None:
    """From now on tensors are made on DEVICE, also those that test modules make when they are imported."""
    if DEVICE.type != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # matrix products that repeat themselves
        _TensorsOn(DEVICE).__enter__()
