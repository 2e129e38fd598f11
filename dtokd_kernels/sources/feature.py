"""A Gram matrix at the shared representation instead of at the parameters (MGDA-UB)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..rows import GradientRows
from ..types import Balance, Options, Role
from .source import Call, Source


class Feature(Source):
    """Gram matrix of the gradients with respect to a representation that all objectives share; then one full pass.

    Source: MGDA-UB (Sener and Koltun, NeurIPS 2018): the objective at the representation bounds the one at the
    parameters below it from above, up to the Jacobian's norm; objectives that compare other layers do not pass there.

    Cost: K backward passes from the losses to the representation, besides the one of a weighted sum. Every
    parameter takes sum_i c_i g_i, as with `Probe`.

    Args:
        of: the module whose last output is the representation; a forward hook keeps that (and with it its graph)
            until the next backward. Default: pass it to each call, `backward(losses, features=z)`.

    Raises:
        TypeError: `of` is no module.
    """

    def __init__(self, of: nn.Module | None = None) -> None:
        self._of = of
        self._output: Any = None
        if of is None:
            return
        if not isinstance(of, nn.Module):
            raise TypeError(f"Feature: of is a {type(of).__name__}; pass the module whose output the objectives share")
        weakref.finalize(self, of.register_forward_hook(_Keep(self)).remove)

    def __reduce__(self) -> Any:
        return Feature, (self._of,)  # a copy has a hook of its own

    def __repr__(self) -> str:
        return "Feature()" if self._of is None else f"Feature({type(self._of).__name__})"

    def one_pass(self, names: tuple[str, ...], params: Sequence[Tensor]) -> bool:
        """Every step takes one full backward pass."""
        return True

    def weigh(self, call: Call, options: Options) -> Balance:
        """Weights from the gradients at the representation."""
        features = self._features(call)
        rows = [call.gradients(value, features) for value in call.values]
        for name, row in zip(call.names, rows, strict=True):
            if all(g is None for g in row):
                raise ValueError(
                    f"{call.op}: objective {name!r} was not computed from the features of gram={self!r}; choose a "
                    "representation that all objectives share; inside torch.compile or a reentrant checkpoint it is "
                    "not seen: return it and pass backward(losses, features=z)"
                )
        at_features = GradientRows.of(list(zip(*rows, strict=True)), [Role.SHARED] * len(features))
        grams = kernels.unscaled(kernels.gram(at_features, len(call.losses), options.backend), call.scale)
        if call.ranks is not None:
            grams = call.ranks.sample_gram(grams)
        return kernels.balance(grams, call.losses, options)

    def release(self) -> None:
        """Forget the module's output."""
        self._output = None

    def _features(self, call: Call) -> Sequence[Tensor]:
        features = call.features
        if features is None and self._output is not None:
            features = [self._output] if isinstance(self._output, Tensor) else list(self._output)
        if not features:
            what = "pass backward(losses, features=z)" if self._of is None else "run its forward pass, with gradients"
            raise ValueError(f"{call.op}: gram={self!r} has no features for this call; {what} before")
        for i, z in enumerate(features):
            if not isinstance(z, Tensor) or not z.requires_grad:
                got = "a tensor without gradient" if isinstance(z, Tensor) else f"a {type(z).__name__}"
                raise ValueError(
                    f"{call.op}: features[{i}] is {got}; pass the tensor that the losses were computed from"
                )
        return features


class _Keep:
    """The forward hook of a source's module: keeps its output. In a copy of the module it does nothing."""

    def __init__(self, source: Feature | None) -> None:
        self._source = None if source is None else weakref.ref(source)

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        source = None if self._source is None else self._source()
        if source is not None and torch.is_grad_enabled():
            source._output = output

    def __reduce__(self) -> Any:
        return _Keep, (None,)
