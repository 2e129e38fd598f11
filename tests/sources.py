"""The sources of the Gram matrix that the tests try, with weightings and optimizers, and a run to try them in."""

import pytest
import torch

import dtokd_kernels as dk
from dtokd_kernels.asking import takes_losses
from dtokd_kernels.sources import Ema, Every, Feature, Probe

from .oracle import batch, losses_of


def inverse_norm(gram):
    weights = gram.diagonal().rsqrt()
    return weights / weights.sum()


def weights_by(weighting, gram, losses):
    return weighting(gram, losses) if takes_losses(weighting) else weighting(gram)


def by_loss(gram, losses):
    return losses / losses.sum() + 0 * gram.diagonal()


WEIGHTINGS = {
    "dto": dk.weighting.DTO(),
    "affine": dk.weighting.DTO(clamp=False),
    "mgda": dk.weighting.DTO(log_gradients=False),
    "inverse norm": inverse_norm,
    "by loss": by_loss,
}


each_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)


OPTIMIZERS = {
    "adamw": lambda params, **options: dk.DTOAdamW(params, lr=1e-2, eps=1e-3, **options),
    "sgd": lambda params, **options: dk.DTOSGD(params, lr=1e-2, momentum=0.9, **options),
}


each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


#: From a model to what `gram=` takes.
SOURCES = {
    "exact": lambda model: "exact",
    "overlap": lambda model: "overlap",
    "lag": lambda model: "lag",
    "probe": lambda model: Probe(model.trunk),
    "probe found": lambda model: "probe",
    "feature": lambda model: Feature(model.trunk),
    "every": lambda model: Every(3),
    "ema": lambda model: Ema(0.5),
    "every ema probe": lambda model: Every(2, Ema(0.5, Probe(model.trunk))),
    "ema lag": lambda model: Ema(0.5, "lag"),
    "every overlap": lambda model: Every(2, "overlap"),
}


each_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


def train(model, optimizer, steps, start=0):
    """Steps on a batch each; the weights that each took."""
    weights = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch(step)))
        optimizer.step()
        weights.append(optimizer.balance.weights)
    return torch.stack(weights)


def copies(params):
    return [p.detach().clone() for p in params]


def state_of(optimizer):
    return {
        (i, n): v.clone() for i, s in optimizer.state_dict()["state"].items() for n, v in s.items() if v is not None
    }


def assert_same(one, two, tolerance=0.0):
    assert all((p - q).abs().max() <= tolerance for p, q in zip(one, two, strict=True))


def full_passes(model, action):
    """How many backward passes reach the first layer's bias during an action."""
    calls = []
    handle = model.trunk.bias.register_hook(lambda grad: calls.append(1))
    action()
    handle.remove()
    return len(calls)
