"""What may look at gradients while autograd writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .reach import Reach


class Watch(Protocol):
    """Looks at gradients while autograd writes them: `register_post_accumulate_grad_hook` on each parameter.

    One belongs to the gradients between two zero_grad().
    """

    def watches(self, i: int, K: int) -> bool:
        """Whether `ready` is to be called in pass i of K."""

    def start(self, rows: Sequence[Sequence[Tensor | None]], balanced: Sequence[bool], reach: Reach) -> None:
        """A call of `backward` begins.

        Args:
            rows: the gradient sets, filled as it goes.
            balanced: for each parameter, whether its group is balanced.
            reach: which objectives reach which parameters, as it is known now.
        """

    def ready(self, i: int, t: int, gradient: Tensor) -> None:
        """Pass i has written the gradient of parameter t."""

    def finish(self) -> None:
        """All passes of the call are done."""
