"""A drop-in for the loss balancer of EnCodec and audiocraft."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dtokd_kernels.checks import check_flag
from dtokd_kernels.gradients import named_losses
from dtokd_kernels.weighting._arguments import check_number

_OP = "Balancer.backward"


class Balancer:
    """The gradient at a model's output is made of set shares of each loss's gradient there; one backward pass follows.

    With n_i the averaged norm of the gradient of loss i at the output, the model receives

        sum_i r_i T / (n_i + epsilon) g_i,   r_i = w_i / sum_j w_j,

    j over the losses of this call. The norms are averaged over the steps, with a correction for the start, and over the
    processes. Only what is before the output learns: discriminators do not.

    The interface and the numbers are those of audiocraft's `Balancer`. Beyond it the averages can be saved
    (`state_dict`), and nothing is read on the host, so that a GPU does not wait. For another rule than shares take
    `dtokd_kernels.BalancedLoss` with `sources.Feature`.

    Source: EnCodec (Defossez et al., 2022), section 3.4.

    Args:
        weights: w, a number for each loss that may come.
        balance_grads: False multiplies the gradients by w as they are.
        total_norm: T.
        ema_decay: what the average of the norms keeps per step, from 0 to below 1.
        per_batch_item: take the norm of each item of the batch and their mean, in place of the whole batch's norm.
        epsilon: added to the norms.
        monitor: have the shares of the norms before balancing in `metrics`.

    Raises:
        TypeError, ValueError: no weights, or one that is negative; numbers outside their range.

    Example:
        >>> import torch
        >>> from dtokd.audiocraft import Balancer
        >>> balancer = Balancer({"l1": 1.0, "adv": 3.0}, per_batch_item=False)
        >>> wav = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> float(balancer.backward({"l1": 10 * wav[0], "adv": 0.1 * wav[1]}, wav))  # as 0.25 wav[0] + 0.75 wav[1]
        3.75
        >>> wav.grad
        tensor([0.2500, 0.7500])
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        balance_grads: bool = True,
        total_norm: float = 1.0,
        ema_decay: float = 0.999,
        per_batch_item: bool = True,
        epsilon: float = 1e-12,
        monitor: bool = False,
    ) -> None:
        example = "a number for each loss, such as {'l1': 1.0, 'adv': 3.0}"
        if not isinstance(weights, Mapping) or not any(weights.values()):
            raise ValueError(f"Balancer: weights is {weights!r}; pass {example}")
        for value in weights.values():
            check_number("Balancer", "a weight", value, 0, example)
        check_number("Balancer", "total_norm", total_norm, math.ulp(0.0), "a positive number")
        check_number("Balancer", "ema_decay", ema_decay, 0, "from 0 to below 1, such as 0.999", below=1)
        check_number("Balancer", "epsilon", epsilon, 0, "a number that is not negative")
        flags = {"balance_grads": balance_grads, "per_batch_item": per_batch_item, "monitor": monitor}
        for name, flag in flags.items():
            check_flag(f"Balancer: {name}", flag)
        self.weights = dict(weights)
        self.balance_grads = balance_grads
        self.total_norm = total_norm
        self.ema_decay = ema_decay
        self.per_batch_item = per_batch_item
        self.epsilon = epsilon
        self.monitor = monitor
        self._averages: dict[str, Tensor] = {}  # of each loss: the sum of its norms, and what that is divided by
        self._metrics: dict[str, Tensor] = {}

    @property
    def metrics(self) -> dict[str, Tensor]:
        """With `monitor`, "ratio_NAME" of the last call: each norm over the sum of them, before balancing."""
        return self._metrics

    def backward(self, losses: Mapping[str, Tensor], input: Tensor) -> Tensor:
        """Backward through the model with the balanced gradient at its output.

        Args:
            losses: scalars by name, all computed from `input`.
            input: the model's output, [B, ...] if norms are taken per item of the batch.

        Returns:
            Scalar, detached: the sum of the losses as they count.

        Raises:
            TypeError, ValueError: a loss without a weight; all weights of these losses 0; a loss that is no scalar or
                does not depend on `input`. Nothing has changed then.

        Effects: one backward pass per loss down to `input`, and one through the model. No host sync on CUDA.
        """
        if not isinstance(losses, Mapping):
            raise TypeError(f"{_OP}: losses is a {type(losses).__name__}; pass a dict from names to scalar tensors")
        names, values = named_losses(losses, _OP, len(self.weights))
        unknown = [name for name in names if name not in self.weights]
        if unknown:
            raise ValueError(f"{_OP}: there is no weight of the losses {unknown}; weights has {list(self.weights)}")
        if self.per_batch_item and input.dim() == 0:
            raise ValueError(f"{_OP}: input is a scalar and has no items; pass per_batch_item=False to Balancer")
        total_weight = sum(self.weights[name] for name in names)
        if total_weight == 0:
            raise ValueError(f"{_OP}: the weights of the losses {list(names)} are all 0; pass a positive one")
        grads = []
        for name, value in zip(names, values, strict=True):
            (grad,) = torch.autograd.grad(value, [input], retain_graph=True, allow_unused=True)
            if grad is None:
                raise ValueError(f"{_OP}: losses[{name!r}] does not depend on input; leave it out of the balance")
            grads.append(grad)
        with torch.no_grad():
            averages = self._averaged(names, grads)
            total = torch.zeros_like(input)
            effective = torch.zeros((), dtype=input.dtype, device=input.device)
            for name, value, grad in zip(names, values, grads, strict=True):
                scale: Any = self.weights[name]
                if self.balance_grads:
                    share = self.weights[name] / total_weight
                    scale = (share * self.total_norm / (self.epsilon + averages[name])).to(grad.dtype)
                total += scale * grad
                effective += scale * value.detach()
        input.backward(total)
        return effective

    def _averaged(self, names: tuple[str, ...], grads: list[Tensor]) -> dict[str, Tensor]:
        """The norms, averaged over the steps and over the processes."""
        if self.per_batch_item:
            norms = torch.stack([g.double().reshape(len(g), -1).norm(dim=1).sum() for g in grads])
        else:
            norms = torch.stack([g.double().norm() for g in grads])
        count = float(len(grads[0])) if self.per_batch_item else 1.0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            summed = torch.cat([norms, norms.new_full((1,), count)])
            torch.distributed.all_reduce(summed)
            norms = summed[:-1] / summed[-1]
        else:
            norms = norms / count
        found = {}
        for name, norm in zip(names, norms, strict=True):
            before = self._averages.get(name, norms.new_zeros(2))  # made on the device: a copy would wait
            self._averages[name] = before.to(norm.device) * self.ema_decay + torch.stack([norm, torch.ones_like(norm)])
            found[name] = self._averages[name][0] / self._averages[name][1]
        if self.monitor:
            total = torch.stack(list(found.values())).sum()
            self._metrics = {f"ratio_{name}": norm / total for name, norm in found.items()}
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """The averages: for each loss [2] float64, a sum of norms and what it is divided by."""
        return {name: value.clone() for name, value in self._averages.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: it has other losses than `weights`. Nothing has changed then.
        """
        unknown = [name for name in state if name not in self.weights]
        if unknown:
            raise ValueError(
                f"Balancer.load_state_dict: the state has the losses {unknown}; weights has {list(self.weights)}"
            )
        self._averages = {name: value.clone() for name, value in state.items()}
