"""No host sync between `backward` and the end of `step`: on tensors that say they are on a GPU, and raise where it is.

`test_gpu.py` asks a real device the same.
"""

import pytest
import torch
from dtokd.audiocraft import Balancer
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels import reach
from dtokd_kernels.distributed import replicas
from dtokd_kernels.sources import Ema, Every, Feature, Probe

from . import emulated, pretended_ranks
from .device import DEVICE
from .pretended import Pretended, Waits, pretending

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU is there")
#: With dampening a second step reads once whether the first was skipped.
OPTIMIZERS = {"adamw": dk.DTOAdamW, "sgd": lambda params, **o: dk.DTOSGD(params, momentum=0.9, **o)}


@pytest.fixture
def device(emulated_library, monkeypatch):
    """A GPU that is none, whose CUDA kernels are emulated; the list of looks for zeros, which wait."""
    looks = []

    def read(found):
        looks.append(len(found))
        return found.host.tolist()

    monkeypatch.setattr(reach, "read", read)
    with pretending(), emulated.emulated_cuda(emulated_library, "cuda"):
        yield looks


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.trunk = nn.Linear(3, 5)
        self.head = nn.Linear(5, 2)
        for module in (self.trunk, self.head):
            for name, p in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(Pretended(torch.randn(p.shape, generator=generator))))

    def losses(self, seed):
        x = Pretended(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)))
        z = self.trunk(x).tanh()
        return {"task": self.head(z).square().mean(), "distill": (z - 1).square().mean()}


def run(optimizer, model, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        optimizer.backward(model.losses(step))
        optimizer.step()


@pytest.mark.parametrize(
    "source",
    ["exact", "overlap", "lag", Ema(0.5), Every(2), lambda model: Probe(model.trunk)],
    ids=["exact", "overlap", "lag", "ema", "every", "probe"],
)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", ["cuda", "reference"])
def test_a_step_does_not_wait(device, name, make, source):
    model = Model()
    groups = [{"params": model.trunk.parameters()}, {"params": model.head.parameters(), "weight_decay": 0.1}]
    source = source(model) if callable(source) else source
    optimizer = make(groups, lr=1e-2, max_norm=1.0, gram=source, backend=name)
    before = [p.host.clone() for p in model.parameters()]
    run(optimizer, model)
    assert not any(torch.equal(p.host, b) for p, b in zip(model.parameters(), before, strict=True))
    assert not optimizer.balance.skipped.host
    assert len(device) == 1  # in the first step


@pytest.mark.parametrize("name", [n for n in dk.weighting.NAMES if n not in ("fixed",)])
def test_a_weighting_does_not_wait(device, name):
    model = Model()
    weighting = dk.weighting.from_name(name)
    optimizer = dk.DTOAdamW(model.parameters(), lr=1e-2, weighting=weighting, gram="exact", backend="cuda")
    run(optimizer, model)
    assert optimizer.balance.weights.host.isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda model: {"gram": Probe(model.trunk)},
        lambda model: {"gram": Every(2, Feature(model.trunk))},
        lambda model: {"weighting": dk.weighting.Share({"task": 0.5, "distill": 0.5}), "gram": Feature(model.trunk)},
        lambda model: {"weighting": dk.weighting.Amortized()},
    ],
    ids=["probe", "every", "share", "amortized"],
)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_one_loss_does_not_wait(device, make, scaled):
    model = Model()
    balanced = dk.BalancedLoss(**make(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    for step in range(3):
        loss = balanced(model.losses(step), scaler=scaler)
        (loss if scaler is None else scaler.scale(loss)).backward()
    assert not balanced.balance.skipped.host
    assert all(p.grad.host.isfinite().all() for p in model.parameters())


def test_audiocrafts_balancer_does_not_wait(device):
    model = Model()
    balancer = Balancer({"task": 1.0, "distill": 3.0}, monitor=True)
    for step in range(2):
        x = Pretended(torch.randn(4, 3, generator=torch.Generator().manual_seed(step)))
        out = model.head(model.trunk(x).tanh())
        balancer.backward({"task": out.square().mean(), "distill": (out - 1).square().mean()}, out)
    assert balancer.metrics["ratio_task"].host > 0


@pytest.mark.parametrize("source", ["exact", "lag", Every(2)], ids=["exact", "lag", "every"])
def test_a_scaled_step_does_not_wait(device, source):
    model = Model()
    optimizer = dk.DTOAdamW(model.parameters(), lr=1e-2, max_norm=1.0, gram=source, backend="cuda")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    for step in range(2):
        optimizer.zero_grad()
        optimizer.backward(model.losses(step), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert scaler._scale.host == 256


@pytest.mark.parametrize("source", ["exact", "overlap", "lag", Every(2)], ids=["exact", "overlap", "lag", "every"])
@pytest.mark.parametrize("static", [False, True], ids=["flags", "static"])
@pytest.mark.parametrize("shard", [False, True], ids=["replicas", "sharded"])
def test_a_step_of_several_ranks_does_not_wait(device, monkeypatch, shard, static, source):
    if shard and source == "lag":
        pytest.skip("is refused")
    flags = []

    def read(found):
        flags.append(len(found))
        return found.host.tolist()

    monkeypatch.setattr(replicas, "read", read)
    model = Model()
    with pretended_ranks.ranks(2):
        optimizer = dk.DTOAdamW(model.parameters(), lr=1e-2, max_norm=1.0, gram=source, backend="cuda")
        dk.distributed.attach(optimizer, bucket_bytes=32, static_graph=static, shard=shard)
        run(optimizer, model)
    assert all(p.host.isfinite().all() for p in model.parameters())
    passes = [2, 1, 2] if isinstance(source, Every) else [2, 2, 2]  # of each step
    # once in each pass, and not for each bucket; with a static graph only in the first pass of its kind
    assert len(flags) == (len(set(passes)) + 1 if static else sum(passes))


@pytest.mark.parametrize(
    "waiting",
    [
        lambda gram: torch.tensor([1.0, gram[0, 0].item()]),
        lambda gram: torch.ones(2) if gram[0, 1] < 0 else torch.zeros(2),
        lambda gram: gram.diagonal()[gram.diagonal() > 0],
        lambda gram: gram.cpu().diagonal(),
        lambda gram: torch.tensor([0.5, 0.5], device=gram.device),
        lambda gram: gram @ torch.ones(2, dtype=torch.float64),
    ],
    ids=["item", "branch", "mask", "cpu", "numbers", "devices"],
)
def test_what_waits_is_seen(device, waiting):
    model = Model()
    optimizer = dk.DTOAdamW(model.parameters(), lr=1e-2, weighting=waiting, backend="cuda")
    with pytest.raises(Waits):
        run(optimizer, model, steps=1)
