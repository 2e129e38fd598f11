"""No Gram matrix at all: for weightings that need none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels, reference
from ..types import Balance, Options, Role
from .source import Call, Source


def stand_in(losses: Tensor, options: Options) -> Tensor:
    """[K, K] float64, in place of a Gram matrix: the identity, but 0 for an objective at its lower bound."""
    return (~reference.at_bound(losses, options)).double().diag()


@dataclass(eq=False)
class Unmeasured(Source):
    """One backward pass of sum_i c_i L_i; the default of weightings with `needs_gram = False`.

    Cost: that of a weighted sum. `balance` has NaN for what was not measured: gram, cosine, norms. An objective at its
    lower bound is left out (`reference.at_bound`).
    """

    def one_pass(self, names: tuple[str, ...], params: Sequence[Tensor]) -> bool:
        """Every step takes one full backward pass."""
        return True

    def weigh(self, call: Call, options: Options) -> Balance:
        """The weighting sees the identity in place of the Gram matrix, zero where there is no gradient."""
        gram = stand_in(call.losses, options)
        record = kernels.balance(kernels.by_role({Role.SHARED: gram}, call.losses), call.losses, options)
        unknown = torch.full_like(gram, torch.nan)
        return replace(record, gram=unknown, cosine=unknown, norms=unknown[0])
