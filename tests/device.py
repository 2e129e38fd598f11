"""Where the tests run: on the CPU, or with DTOKD_TEST_DEVICE=cuda the very same cases on a GPU (`make gpu`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def tensors_on_device() -> Iterator[None]:
    """Inside, tensors are made on DEVICE unless a call names another."""
    if DEVICE.type == "cpu":
        yield
        return
    with _TensorsOn(DEVICE):
        yield
