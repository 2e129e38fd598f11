"""What several ranks hold of timm's models lies where GPU kernels read and write 16 bytes at a time."""

import pytest
import timm
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dtokd_kernels as dk

from . import pretended_ranks

#: With numbers of classes that are no multiple of 4.
MODELS = {"resnet18": 37, "convnext_tiny": 102, "deit_tiny_patch16_224": 10}


def misaligned(tensors) -> int:
    """Elements of tensors that do not begin at a multiple of 16 bytes."""
    return sum(t.numel() for t in tensors if t is not None and t.numel() and t.data_ptr() % 16)


@pytest.fixture(scope="module", params=MODELS)
def shapes(request):
    with torch.device("meta"):
        return [p.shape for p in timm.create_model(request.param, num_classes=MODELS[request.param]).parameters()]


@pytest.mark.parametrize(
    ("shard", "rank", "size", "dtype"),
    [(False, 0, 2, torch.float32), (True, 1, 3, torch.float32), (True, 6, 8, torch.bfloat16)],
)
def test_no_element_is_misaligned(shapes, shard, rank, size, dtype):
    params = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    optimizer = dk.DTOAdamW(params, backend="reference", state_dtype=torch.float32)
    with pretended_ranks.ranks(size, rank):
        ranks = dk.distributed.attach(optimizer, shard=shard)
        losses = [sum(p.float().sum() for p in params) + 1, sum(2 * p.float().sum() for p in params) + 1]
        optimizer.backward(losses)
        assert all(g is not None for row in optimizer._sets.grads for g in row)
        assert misaligned(g for row in optimizer._sets.grads for g in row) == 0
        states = [optimizer._state_of(p, optimizer.param_groups[0]) for p in params]
        parts, held = ranks.local_rows(params, states)
        assert misaligned(parts) == misaligned(t for state in held for t in state.values() if t.dim()) == 0
        for g, p, state in zip(optimizer._sets.grads[0], parts, held, strict=True):
            assert g.numel() == p.numel() == state["exp_avg"].numel()
        assert isinstance(states[0]["exp_avg"], DTensor) == shard


@pytest.mark.parametrize(
    ("size", "dtype", "share"),
    [(2, torch.float32, 0.0), (8, torch.float32, 0.0), (8, torch.bfloat16, 0.0), (3, torch.float32, 0.45)],
    ids=str,
)
def test_fsdp_places_gradients_where_it_likes(size, dtype, share):
    """Which docs/distributed.md tells: a rank's parts follow one another, aligned if widths divide by the ranks."""
    with pretended_ranks.ranks(size, 1):
        mesh = dist.init_device_mesh("cpu", (size,))
        model = timm.create_model("resnet18", num_classes=37).to(dtype).eval()
        for block in (model.layer1, model.layer2, model.layer3, model.layer4, model):
            fully_shard(block, mesh=mesh)
        model(torch.zeros(1, 3, 32, 32, dtype=dtype)).float().sum().backward()
        gradients = [p.grad.to_local() for p in model.parameters()]
        assert misaligned(p.to_local() for p in model.parameters()) == 0
    assert abs(misaligned(gradients) / sum(g.numel() for g in gradients) - share) < 0.005
