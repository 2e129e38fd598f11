"""`dk.probe`: what it finds, and that the training goes on as if it had not been called."""

import copy
import random

import pytest
import torch
from torch import nn

import dtokd_kernels as dk


class Net(nn.Module):
    """With all that could remember a look: BatchNorm, dropout, a frozen layer, a head of one loss."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.task, self.feature = nn.Linear(16, 4), nn.Linear(16, 8)

    def forward(self, x):
        x = self.frozen(self.trunk(x))
        return self.task(x), self.feature(x)


def losses_of(net, x):
    logits, feature = net(x)
    return {"task": logits.logsumexp(1).mean(), "kd": feature.square().mean()}


def train(probing, amp=False, steps=4):
    """A plain loop of two weighted losses; the model, and what was found."""
    torch.manual_seed(3)
    random.seed(3)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    found = []
    for _ in range(steps):
        x = torch.randn(12, 6)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            losses = losses_of(net, x)
        if probing:
            found.append(dk.probe({"task": 0.3 * losses["task"], "kd": 0.7 * losses["kd"]}, net.parameters()))
        (0.3 * losses["task"] + 0.7 * losses["kd"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, found, (torch.get_rng_state(), random.getstate())


@pytest.mark.parametrize("amp", [False, True])
def test_the_training_is_not_changed(amp):
    """Parameters, BatchNorm's statistics and random generators have the same bits."""
    plain, _, state = train(False, amp)
    net, found, state_probed = train(True, amp)
    for (name, a), b in zip(plain.state_dict().items(), net.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(state[0], state_probed[0])
    assert state[1] == state_probed[1]
    assert all(one.norms.isfinite().all() for one in found)


def test_gradients_that_are_there_stay():
    """Between two micro-batches of an accumulation, `.grad` keeps its memory and its bits."""
    net = Net()
    sum(losses_of(net, torch.randn(5, 6)).values()).backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    kept = copy.deepcopy(grads)
    losses = losses_of(net, torch.randn(5, 6))
    dk.probe(losses, net.parameters())
    for name, p in net.named_parameters():
        assert p.grad is grads[name]
        assert p.grad is None or torch.equal(p.grad, kept[name])
    sum(losses.values()).backward()


@pytest.mark.parametrize("K", [1, 2, 5])
def test_what_it_finds(K):
    """Against the definitions in float64; a parameter that only some losses reach counts as zero for the others."""
    torch.manual_seed(K)
    w, own = nn.Parameter(torch.randn(7, dtype=torch.float64)), nn.Parameter(torch.randn(3, dtype=torch.float64))
    targets = torch.randn(K, 7, dtype=torch.float64)
    losses = [(w - t).square().sum() for t in targets]
    losses[0] = losses[0] + own.square().sum()
    found = dk.probe(losses, [w, own])
    zeros = torch.zeros(K, 3, dtype=torch.float64)
    zeros[0] = 2 * own.detach()
    rows = torch.cat([2 * (w.detach() - targets), zeros], 1)
    norms = rows.norm(dim=1)
    torch.testing.assert_close(found.norms, norms)
    torch.testing.assert_close(found.share, norms / norms.sum())
    torch.testing.assert_close(found.cosine, rows @ rows.T / norms[:, None] / norms)
    assert found.names == tuple(map(str, range(K)))
    scalars = found.scalars()
    assert len(scalars) == 3 * K + K * (K - 1) // 2
    assert scalars["loss_0"] == pytest.approx(float(losses[0].detach()))


def test_tied_weights_count_once():
    """As those of two modules that are listed one after the other."""
    tied, own = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    losses = {"a": tied.square().sum(), "b": own.square().sum()}
    once, twice = (dk.probe(losses, params) for params in ([tied, own], [tied, own, tied]))
    assert torch.equal(twice.norms, once.norms)
    assert twice.share.tolist() == [0.5, 0.5]


def test_a_zero_gradient():
    w = nn.Parameter(torch.zeros(3))
    found = dk.probe({"a": w.square().sum(), "b": w.sum()}, [w])
    assert found.share.tolist() == [0, 1]
    assert found.cosine[0, 1] == 0


def test_scaled_losses_have_the_same_shares():
    net = Net().double()
    losses = losses_of(net, torch.randn(5, 6).double())
    plain = dk.probe(losses, net.parameters())
    scaled = dk.probe({name: 1024 * loss for name, loss in losses.items()}, net.parameters())
    torch.testing.assert_close(scaled.share, plain.share)
    torch.testing.assert_close(scaled.cosine, plain.cosine)


def test_small_gradients_in_float16_need_the_scale():
    """Without it they are 0, so that the loss seems not to act."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(12, 8)

    def shares(scale, amp=True):
        with torch.autocast("cpu", torch.float16, enabled=amp):
            y = net(x).float()
        losses = {"task": 2e-7 * y.logsumexp(1).mean(), "kd": 1e-7 * y.square().mean()}
        return dk.probe({name: scale * loss for name, loss in losses.items()}, net.parameters())

    exact = shares(1.0, amp=False)
    torch.testing.assert_close(shares(2.0**16).share, exact.share, rtol=0.02, atol=0)
    assert float(shares(1.0).norms.max()) < 0.5 * float(exact.norms.min())


def test_nothing_waits():
    net = Net()
    losses = losses_of(net, torch.randn(5, 6))
    with dk.debug.warn_on_sync():
        dk.probe(losses, net.parameters())


@pytest.mark.parametrize(
    ("losses", "params", "error", "told"),
    [
        (lambda net, y: {"kd": y[0].mean().detach()}, lambda net: net.parameters(), ValueError, "'kd'.* no gradient"),
        (lambda net, y: {"kd": 3.0}, lambda net: net.parameters(), TypeError, "'kd'.* is a float"),
        (lambda net, y: {"kd": y[0]}, lambda net: net.parameters(), ValueError, "expected a scalar"),
        (lambda net, y: {}, lambda net: net.parameters(), ValueError, "losses is empty"),
        (lambda net, y: [y[0].mean()] * 9, lambda net: net.parameters(), ValueError, "at most 8"),
        (lambda net, y: [y[0].mean()], lambda net: net.feature.parameters(), ValueError, "reaches none of the"),
        (lambda net, y: [y[0].mean()], lambda net: net.frozen.parameters(), ValueError, "needs a gradient"),
        (lambda net, y: [y[0].mean()], lambda net: [], ValueError, "params is empty"),
    ],
)  # fmt: skip
def test_refused(losses, params, error, told):
    """And nothing has changed."""
    net = Net()
    y = net(torch.randn(5, 6))
    with pytest.raises(error, match=told):
        dk.probe(losses(net, y), params(net))
    assert all(p.grad is None for p in net.parameters())
    y[0].mean().backward()
