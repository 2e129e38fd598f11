"""200 steps of training on two and three losses: every backend stays where the reference in float64 is."""

from functools import cache

import pytest
import torch
from torch import nn

import dtokd_kernels as dk

from . import tolerances

STEPS = 200
EVERY = 20  # steps between comparisons


class Perceptron(nn.Module):
    """Three objectives: classes, and two targets of a private projector each."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(16, n) for n in (4, 5, 6)])
        self.targets = [torch.randn(32, n, generator=torch.Generator().manual_seed(n)).double() for n in (5, 6)]

    def losses(self, x, y):
        hidden = self.trunk(x)
        classes, *outputs = (head(hidden) for head in self.heads)
        return {
            "task": nn.functional.cross_entropy(classes, y),
            "features": nn.functional.mse_loss(outputs[0], self.targets[0]),
            "logits": 0.1 * nn.functional.smooth_l1_loss(outputs[1], self.targets[1]),
        }

    def batch(self, generator):
        x = torch.randn(32, 10, generator=generator, dtype=torch.float64)
        return x, torch.randint(0, 4, (32,), generator=generator)


class Convolutional(nn.Module):
    """Two objectives: classes, and features of a fixed teacher through a projector."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, stride=2), nn.GroupNorm(2, 6), nn.GELU(), nn.Conv2d(6, 8, 3))
        self.head = nn.Linear(8, 3)
        self.projector = nn.Conv2d(8, 4, 1)
        self.teacher = torch.randn(16, 4, 1, 1, generator=torch.Generator().manual_seed(3)).double()

    def losses(self, x, y):
        features = self.stem(x)
        return {
            "task": nn.functional.cross_entropy(self.head(features.mean((2, 3))), y),
            "distill": nn.functional.mse_loss(self.projector(features), self.teacher.expand(-1, -1, 3, 3)),
        }

    def batch(self, generator):
        x = torch.randn(16, 2, 12, 12, generator=generator, dtype=torch.float64)
        return x, torch.randint(0, 3, (16,), generator=generator)


class Logits(nn.Module):
    """Two objectives on the same logits, labels and a softened teacher: aligned and unequal, so often at a vertex."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 4))
        self.teacher = torch.randn(10, 4, generator=torch.Generator().manual_seed(7)).double()

    def losses(self, x, y):
        logits, wanted = self.net(x), x @ self.teacher
        soft = nn.functional.kl_div((logits / 4).log_softmax(1), (wanted / 4).softmax(1), reduction="batchmean")
        return {"task": nn.functional.cross_entropy(logits, wanted.argmax(1)), "distill": 16 * soft}

    batch = Perceptron.batch


RUNS = {
    "adamw": (Convolutional, dk.DTOAdamW, {"lr": 2e-3}),
    "adamw amsgrad clipped": (Perceptron, dk.DTOAdamW, {"lr": 2e-3, "amsgrad": True, "max_norm": 0.5}),
    "adamw all balanced": (Perceptron, dk.DTOAdamW, {"lr": 2e-3, "private": "balanced", "rescale": "sum"}),
    "adamw logits": (Logits, dk.DTOAdamW, {"lr": 2e-3}),
    "sgd nesterov": (Convolutional, dk.DTOSGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
    "sgd clipped": (Perceptron, dk.DTOSGD, {"lr": 0.05, "rescale": "none", "max_norm": 1.0}),
}


def train(name, shaken=False):
    """(parameters after every EVERY steps, weights of every step)."""
    make_model, make_optimizer, options = RUNS[name]
    torch.manual_seed(4)
    model = make_model().double()
    optimizer = make_optimizer(model.parameters(), **options)
    data, noise = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
    snapshots, weights = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        optimizer.backward(model.losses(*model.batch(data)))
        optimizer.step()
        weights.append(optimizer.balance.weights)
        if shaken:
            tolerances.shake(list(model.parameters()), noise)
        if (step + 1) % EVERY == 0:
            snapshots.append([p.detach().clone() for p in model.parameters()])
    assert optimizer.skipped_steps == 0
    return snapshots, torch.stack(weights)


@cache
def reference_run(name, shaken=False):
    with dk.use_backend("reference"):
        return train(name, shaken)


@pytest.mark.parametrize("name", RUNS)
def test_stays_with_the_reference(backend, name):
    expected, their_weights = reference_run(name)
    shaken, _ = reference_run(name, shaken=True)
    snapshots, weights = train(name)
    for i, (got, truth) in enumerate(zip(snapshots, expected, strict=True)):
        allowed = tolerances.drift(truth, shaken[i])
        assert allowed <= 1e-11  # the run does not amplify rounding so much that it could hide a mistake
        worst = max((a - b).abs().max().item() for a, b in zip(got, truth, strict=True))
        assert worst <= allowed, f"after {(i + 1) * EVERY} steps"
    # parameters off by `allowed` move gradients by the curvature (<= 10), and weights by their condition (<= 100)
    assert (weights - their_weights).abs().max() <= 1000 * allowed


def test_runs_meet_vertices_and_insides():
    """Between them the runs visit vertices as well as the inside of the simplex; or they would test half of it."""
    vertices = sum(int((reference_run(name)[1] == 0).any(1).sum()) for name in RUNS)
    assert 20 <= vertices <= len(RUNS) * STEPS - 20
