"""A warning, once, where one objective takes nearly all of the gradient of a balanced run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dtokd_kernels.types import Weighting
from dtokd_kernels.weighting import DTO

#: The weighting, by its name in `weighting.from_name` and `--kd-balance`, to take where exact DTO gives all to one.
REMEDY = "famo"
#: Steps that are looked at together.
WINDOW = 200
#: Of the gradient, in the mean over a window: from here on the other objectives are hardly trained.
NEARLY_ALL = 0.95


class LopsidedWeights:
    """A sink of `BalanceLogger` that warns once, at the end of the first window in which one objective has it all.

    Exact DTO weighs the shortest gradient most. Where a loss cannot come near 0, as a distillation loss that the
    student cannot follow, its log-gradient stays the shortest, and the other objectives are hardly trained. The text
    tells the objective's mean share of the gradient, as `BalanceLogger` has it (a long gradient with a small weight
    trains the student too), in how many steps a weight was exactly 0, and what to take instead.

    Args:
        say: takes the text; default: a UserWarning.
        remedy: how the user takes another weighting, for the text.
    """

    def __init__(
        self, say: Callable[[str], None] | None = None, remedy: str = f"weighting.from_name({REMEDY!r})"
    ) -> None:
        self._say, self._remedy = say or _warn, remedy
        self._told = False
        self._steps, self._vertices = 0, 0
        self._sums: dict[str, float] = {}

    def write(self, rows: Sequence[Mapping[str, float]], means: Mapping[str, float]) -> None:
        """Look at some steps."""
        for row in rows:
            if not (self._told or row["skipped"]):
                self._add(row)

    def _add(self, row: Mapping[str, float]) -> None:
        for name, part in row.items():
            if name.startswith("share_"):
                self._sums[name] = self._sums.get(name, 0.0) + (part if math.isfinite(part) else 0.0)
        self._vertices += row["vertex"] > 0
        self._steps += 1
        if self._steps < WINDOW:
            return
        name, most = max(self._sums.items(), key=lambda item: item[1])
        if len(self._sums) > 1 and most >= NEARLY_ALL * WINDOW:
            self._told = True
            share, rate = (f"{100 * count / WINDOW:.0f} %" for count in (most, self._vertices))
            self._say(
                f"the objective {name.removeprefix('share_')!r} had {share} of the gradient in the last {WINDOW} steps "
                f"(vertex rate {rate}), so the others are hardly trained; if that is not wanted take another "
                f"weighting, such as {self._remedy}"
            )
        self._steps, self._vertices, self._sums = 0, 0, {}

    def state_dict(self) -> dict[str, Any]:
        """Plain values, so that a run that goes on warns no second time."""
        return {"told": self._told, "steps": self._steps, "vertices": self._vertices, "sums": dict(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._told, self._steps, self._vertices = state["told"], state["steps"], state["vertices"]
        self._sums = dict(state["sums"])

    def close(self) -> None:
        """Do nothing, as there is no file to close."""


def may_be_lopsided(weighting: Weighting | None) -> bool:
    """Whether a weighting is exact DTO, which can give all of the weight to one objective unasked."""
    return isinstance(weighting, DTO)


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=2)
