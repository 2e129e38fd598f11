"""CPU tensors that say they are on a GPU, for machines without one: what would wait for the device raises.

So does what mixes devices. The numbers are those of the CPU. What runs under `pretending()` may make tensors on the
GPU, move them between devices without waiting, and call any operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
#: Operations that bring a number to the host, or whose result has a size that only the device knows.
WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero"}


class Waits(AssertionError):
    """The host would have to wait for the device."""


class Pretended(Tensor):
    """A tensor "on the GPU"."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> Pretended:
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        made: Pretended = torch.Tensor._make_wrapper_subclass(cls, host.size(), device="cpu", **layout)
        made.host = host
        return made

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    def tolist(self) -> list[Any]:
        raise Waits("tolist")

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise Waits("numpy")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        masked = name.startswith("index") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or masked:
            raise Waits(name)
        given = [t for t in tree_flatten((args, kwargs or {}))[0] if isinstance(t, Tensor)]
        # a number of the host may stand beside tensors of the device
        if any(not isinstance(t, Pretended) and t.dim() > 0 for t in given):
            raise Waits(f"{name} between devices")
        mine = {id(t.host): t for t in given if isinstance(t, Pretended)}
        result = function(*_real(args), **_real(kwargs or {}))

        def pretended(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return mine[id(value)] if id(value) in mine else Pretended(value)

        return tree_map(pretended, result)


def _real(values: Any) -> Any:
    return tree_map(lambda t: t.host if isinstance(t, Pretended) else t, values)


class pretending(TorchFunctionMode):
    """Inside, the GPU is there."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.to:
            return self._move(*args, **kwargs)
        if function is torch.Tensor.cpu:
            return self._move(*args, "cpu", **kwargs)
        if function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__) and args[0].dim() == 1:
            # torch changes a shape in place there, which a wrapper does not follow
            return function(args[0][None], *args[1:])[0]
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return function(*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor):
            raise Waits("a copy of the host's numbers")
        if function in _device_constructors():
            return Pretended(function(*args, **{**kwargs, "device": "cpu"}))
        del kwargs["device"]  # of zeros_like, new_empty and the like
        return function(*args, **kwargs)

    @staticmethod
    def _move(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        here = isinstance(tensor, Pretended)
        there = here if device is None else device.type == "cuda"
        if here != there:
            if not non_blocking:
                raise Waits("a copy between host and device")
            tensor = Pretended(tensor.clone()) if there else tensor.host.clone()
        return torch.Tensor.to(tensor, dtype or tensor.dtype, copy=copy)
