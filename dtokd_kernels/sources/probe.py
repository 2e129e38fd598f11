"""An exact Gram matrix, but over a few parameters: those of the last shared block."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import kernels
from ..reach import Reach
from ..rows import GradientRows
from ..types import Balance, Options, Role
from ..watch import Watch
from .source import Call, Gathered, Source

#: Share of the shared parameters that a probe of its own choice holds; a block of a 12-layer transformer has a twelfth.
SHARE = 1 / 16


class Probe(Source):
    """Gram matrix over the parameters of one block, by K backward passes that end there; then one full pass.

    Cost: K partial passes, as deep as the probe lies, besides the one of a weighted sum. Weights: those that the
    probe's parameters alone would have; private parameters among them stay out. Every parameter takes
    sum_i c_i g_i with c_i = pi_i / L_i: private ones too, so that a head whose objective has weight 0 does not learn
    in that step, and those of a group with `balance=False`.

    Args:
        of: modules or parameters, or a single one. Default: the last parameters, in the optimizer's order, that all
            objectives reach and that hold a sixteenth of all such numbers; the first step, an exact one, finds them.

    Raises:
        TypeError, ValueError: `of` holds something else, or no parameter.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> trunk, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
        >>> optimizer = dk.DTOAdamW([*trunk.parameters(), *head.parameters()], gram=dk.sources.Probe(trunk))
        >>> out = head(trunk(torch.ones(3, 4)).relu())
        >>> optimizer.backward([out.square().mean(), (out - 1).square().mean()])
        >>> optimizer.step()
    """

    def __init__(self, of: nn.Module | Tensor | Iterable[nn.Module | Tensor] | None = None) -> None:
        self._of = None if of is None else _parameters(of)
        self._found: list[Tensor] | None = None
        self._positions: list[int] | None = None  # of what was found
        self._reach = Reach()
        self._loaded: Mapping[str, Any] = {}  # of that, until its parameters are known

    def __repr__(self) -> str:
        return "Probe()" if self._of is None else f"Probe(<{len(self._of)} parameters>)"

    def __getstate__(self) -> dict[str, Any]:
        # a copy's parameters are others
        return {**self.__dict__, "_reach": Reach(), "_loaded": self._known_reach()}

    @property
    def of(self) -> list[Tensor] | None:
        """The parameters that the user chose; None where the probe finds them itself."""
        return self._of

    def begin(self) -> Source:
        """The same choice, without the parameters found."""
        return Probe(self._of)

    def one_pass(self, names: tuple[str, ...], params: Sequence[Tensor]) -> bool:
        """While the probe's parameters are known; those it found itself may have been frozen or removed."""
        return self._of is not None or bool(self._among(params))

    def weigh(self, call: Call, options: Options) -> Balance:
        """Weights from the probe's gradients."""
        probe = self._among(call.params)
        if not probe:
            raise ValueError(
                f"{call.op}: gram={self!r} matches no parameter that is optimized and requires a gradient; probe a "
                "block whose parameters the optimizer has"
            )
        gradients = [call.gradients(value, probe) for value in call.values]
        if call.ranks is not None:
            gradients = call.ranks.average(gradients)
        rows = list(zip(*gradients, strict=True))
        unseen = sum(all(g is None for g in row) for row in rows)
        if unseen:
            warnings.warn(
                f"{call.op}: {unseen} of the {len(rows)} parameters of gram={self!r} have no gradient; a probe does "
                "not see through checkpoint(use_reentrant=True)",
                stacklevel=4,
            )
        if self._loaded:
            self._reach.load_state_dict(self._loaded, probe)
            self._loaded = {}
        self._reach.begin(call.names, probe)
        self._reach.look(gradients, call.ranks)
        shared = [row for t, row in enumerate(rows) if len(self._reach.of(t, row)) == len(row)]
        if not shared:
            raise ValueError(
                f"{call.op}: no parameter of gram={self!r} is reached by all objectives {list(call.names)}; probe the "
                "last block that they share"
            )
        chosen = GradientRows.of(shared, [Role.SHARED] * len(shared))
        grams = kernels.unscaled(kernels.gram(chosen, len(call.losses), options.backend), call.scale)
        return kernels.balance(grams, call.losses, options)

    def _among(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The probe's parameters that are optimized and require a gradient."""
        place = {id(p): t for t, p in enumerate(params)}
        if self._of is None:
            if self._found is None:  # a state that was loaded has their positions
                self._found = [params[t] for t in self._positions or () if t < len(params)]
            self._positions = [place[id(p)] for p in self._found if id(p) in place]
        held = self._found if self._of is None else self._of
        return [p for p in held or () if id(p) in place and p.requires_grad]

    def solve(self, gathered: Gathered, options: Options) -> Balance:
        """An exact step, which finds the last shared parameters."""
        assert isinstance(gathered.watch, _Reached)
        self._positions = gathered.watch.last_shared(gathered)
        self._found = [gathered.params[t] for t in self._positions]
        return super().solve(gathered, options)

    def watch(self, options: Options) -> Watch | None:
        """Knows which parameters all objectives reach."""
        return _Reached()

    def state_dict(self) -> dict[str, Any]:
        """Which parameters were found, and which of their gradients are zero in place of None."""
        found = {"positions": list(self._positions)} if self._positions else {}
        reach = self._known_reach()
        return {**found, "reach": reach} if reach else found

    def _known_reach(self) -> Mapping[str, Any]:
        return self._loaded or self._reach.state_dict(self._reach.params)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the parameters that were found."""
        self._positions = list(state["positions"]) if "positions" in state and self._of is None else None
        self._found, self._reach, self._loaded = None, Reach(), state.get("reach", {})


class _Reached:
    """Remembers which parameters each objective reached."""

    def watches(self, i: int, K: int) -> bool:
        return False

    def start(self, rows: Sequence[Sequence[Tensor | None]], balanced: Sequence[bool], reach: Reach) -> None:
        self._rows, self._balanced = rows, balanced

    def ready(self, i: int, t: int, gradient: Tensor) -> None:
        raise AssertionError("no pass is watched")

    def finish(self) -> None:
        pass

    def last_shared(self, gathered: Gathered) -> list[int]:
        sizes = {
            t: column[0].numel()
            for t, (balanced, *column) in enumerate(zip(self._balanced, *self._rows, strict=True))
            if balanced and gathered.params[t].requires_grad and len(gathered.reach.of(t, column)) == len(column)
        }
        if not sizes:
            raise ValueError(
                f"{gathered.op}: gram=Probe() found no parameter that all objectives reach; pass those to probe, as "
                "Probe(module)"
            )
        found: list[int] = []
        while sum(sizes[t] for t in found) < SHARE * sum(sizes.values()):
            found.insert(0, list(sizes)[-1 - len(found)])
        return found


def _parameters(of: nn.Module | Tensor | Iterable[nn.Module | Tensor]) -> list[Tensor]:
    if not isinstance(of, (nn.Module, Tensor, Iterable)):
        raise TypeError(f"Probe: of is {of!r}; pass modules or parameters")
    parts = [of] if isinstance(of, (nn.Module, Tensor)) else list(of)
    found: dict[int, Tensor] = {}
    for part in parts:
        if not isinstance(part, (nn.Module, Tensor)):
            raise TypeError(f"Probe: of holds a {type(part).__name__}; pass modules or parameters")
        for p in part.parameters() if isinstance(part, nn.Module) else [part]:
            found[id(p)] = p
    if not found:
        raise ValueError(f"Probe: {of!r} has no parameter; probe the last block that all objectives share")
    return list(found.values())
