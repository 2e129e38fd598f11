"""An optimizer's state as one process would have it, of which each rank keeps a part."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor

from ..balanced import Balanced


def whole_state(optimizer: Balanced) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors in the parameters' shapes; all ranks call it.

    `load_state_dict` takes it on any number of ranks, sharded or not, with the same optimizer's groups.

    Args:
        optimizer: `DTOAdamW` or `DTOSGD`.

    Returns:
        What was sharded is whole and on the CPU on the first of the ranks that train it, and left out on the others.
        The rest is as `state_dict()` has it.
    """
    state = optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    whole: dict[int, dict[str, Any]] = {}
    for i, p in zip(numbers, params, strict=True):
        for name, value in state["state"].get(i, {}).items():
            if isinstance(value, DTensor):
                first = not any(value.device_mesh.get_coordinate() or ())  # of the ranks that train it
                value = value.full_tensor().reshape(-1)[: p.numel()].view(p.shape)  # a shard may be filled up
                if not first:
                    continue
                value = value.cpu()
            whole.setdefault(i, {})[name] = value
    return {**state, "state": whole}
