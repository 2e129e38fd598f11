"""The demo's networks: two small ResNets of timm, for 28 x 28 gray images of 10 classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import timm
import torch
from timm.models.resnet import BasicBlock, ResNet

#: What differs from timm's `test_resnet`. Tiny vision transformers learn nothing in a few hundred iterations.
ROLES: dict[str, dict[str, Any]] = {
    "teacher": {},
    "student": {"block": BasicBlock, "channels": (8, 16, 32, 32), "stem_width": 4},
}


def make_model(role: str) -> ResNet:
    """A new network: the "teacher" has 373 thousand parameters, the "student" 40 thousand."""
    return cast(ResNet, timm.create_model("test_resnet", in_chans=1, num_classes=10, **ROLES[role]))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial parameters from this seed; torch's random state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
