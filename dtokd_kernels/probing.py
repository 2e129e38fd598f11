"""One look at the gradients of several losses, from any training loop, which goes on as if there had been none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .checks import check_params
from .gradients import Losses, gradients_of, named_losses

_OP = "probe"


@dataclass(frozen=True)
class Probed:
    """What `probe` found; tensors on the gradients' device.

    Attributes:
        names: of the K losses, in their order.
        losses: [K] float64, their values.
        norms: [K] float64, the norms of their gradients.
        share: [K] float64, each norm over the sum of the norms. Of losses that are passed with their weights, this is
            each one's part in the update of a weighted sum. NaN if all gradients are zero.
        cosine: [K, K] float64, cosines between the gradients; 0 where one of them is zero. Below 0 two losses pull
            apart.
    """

    names: tuple[str, ...]
    losses: Tensor
    norms: Tensor
    share: Tensor
    cosine: Tensor

    def scalars(self) -> dict[str, float]:
        """All of it by name, as loggers take it: loss_NAME, norm_NAME, share_NAME, cosine_NAME_OTHER.

        Effects: one copy to the host.
        """
        K = len(self.names)
        pairs = [(i, j) for i in range(K) for j in range(i + 1, K)]
        kinds = ("loss", "norm", "share")
        names = [f"{kind}_{name}" for kind in kinds for name in self.names]
        names += [f"cosine_{self.names[i]}_{self.names[j]}" for i, j in pairs]
        cosines = [self.cosine[i, j].reshape(1) for i, j in pairs]
        return dict(zip(names, torch.cat([self.losses, self.norms, self.share, *cosines]).tolist(), strict=True))


def probe(losses: Losses, params: Iterable[Tensor]) -> Probed:
    """Norms, shares and cosines of the gradients of K losses, without changing the training.

    Call it between the forward pass and `backward()`, every hundred steps or so. The graph stays for the `backward()`
    that follows; `.grad`, the parameters, BatchNorm's statistics and the random generators are as before (but layers
    that activation checkpointing runs again count their batch again, as in each backward pass). The forward pass may
    have run under autocast. With float16 pass `scaler.scale(loss)`, as to `backward()`: without it small gradients are
    0, and a loss seems not to act. Shares and cosines are the same with it, losses and norms that many times larger.

    Args:
        losses: K scalar tensors, K from 1 to 8, by position or by name; with their weights, if the loop has any.
        params: where to measure, such as `model.parameters()`, or those of the last shared layer, which is cheaper.
            Parameters that need no gradient are left out, and one that is there twice counts once.

    Raises:
        TypeError, ValueError: a loss that is no scalar, needs no gradient, or reaches none of the parameters; no
            parameter that needs a gradient; parameters that are sharded (DTensor).

    Effects: K backward passes down to `params`, and K gradients in memory meanwhile; no host sync. Hooks that were
        registered on tensors run, hooks on accumulated gradients do not; so under DDP each rank sees its own batch.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> losses = {"task": (w - torch.tensor([3.0, 0.0])).square().sum(), "kd": w.sum()}
        >>> found = dk.probe(losses, [w])
        >>> {name: round(value, 2) for name, value in found.scalars().items() if "loss" not in name}
        {'norm_task': 6.0, 'norm_kd': 1.41, 'share_task': 0.81, 'share_kd': 0.19, 'cosine_task_kd': -0.71}
        >>> w.grad is None
        True
    """
    # tied weights may be there twice: their gradient is one
    listed = [p for p in {id(p): p for p in check_params(_OP, params)}.values() if p.requires_grad]
    if not listed:
        raise ValueError(f"{_OP}: no tensor of params needs a gradient; pass parameters that are trained")
    names, values = named_losses(losses, _OP)
    rows = gradients_of(values, listed, _OP)
    for name, row in zip(names, rows, strict=True):
        if all(gradient is None for gradient in row):
            raise ValueError(
                f"{_OP}: losses[{name!r}] reaches none of the parameters; compute it from the model that they are of"
            )
    with torch.no_grad():
        gram = ops.gram(rows)
        norms = gram.diagonal().sqrt()
        products = norms[:, None] * norms
        cosine = torch.where(products > 0, gram / products, torch.zeros_like(gram))
        values_on = torch.stack([v.detach().reshape(()).to(gram.device, torch.float64) for v in values])
        return Probed(names, values_on, norms, norms / norms.sum(), cosine)
