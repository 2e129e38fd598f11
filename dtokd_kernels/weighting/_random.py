"""Random numbers from a counter: the same on every device, and their whole state is one integer tensor.

torch's generators count on the host, where it is not known whether a step is skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INCREMENT = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def uniform(seed: int, step: Tensor, count: int) -> Tensor:
    """`count` independent numbers in (0, 1), float64, of one step of one seed.

    Source: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), its state set to what it is after step * count numbers.

    Args:
        seed: any integer; seeds are mixed, so that neighbours have nothing in common.
        step: scalar int64.
        count: how many; the same in every step.
    """
    index = step * count + torch.arange(1, count + 1, device=step.device)
    state = index * signed(_INCREMENT) + signed(_mixed(seed))
    bits = _mix(state)
    return (_shifted(bits, 11).double() + 0.5) * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * signed(_SECOND)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, places: int) -> Tensor:
    """Right shift of 64 bits without a sign."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def _mixed(seed: int) -> int:
    z = (seed + _INCREMENT) % 2**64
    z = (z ^ (z >> 30)) * _FIRST % 2**64
    z = (z ^ (z >> 27)) * _SECOND % 2**64
    return z ^ (z >> 31)


def signed(bits: int) -> int:
    """The int64 of these 64 bits; torch's products wrap around."""
    return bits - 2**64 if bits >= 2**63 else bits
