"""What backends with fused kernels share: which tensors fit them, and what their operations return.

Kernels take tensors that fit each other: of one dtype that they know, dense, and with equal strides, as they walk
memory and not indices. An operation that meets others says so (`UNFIT`); gradients are copied then, and parameters
or state go through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .types import Balance

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Begins the message of an operation whose tensors do not fit, though they are no mistake of the caller.
UNFIT = "dtokd: unfit"


def register_fakes(namespace: str) -> None:
    """What the operations of a namespace return, for torch.compile and opcheck: shapes without values."""

    @torch.library.register_fake(f"{namespace}::gram")
    def gram_fake(grads: list[Tensor], K: int) -> Tensor:
        return grads[0].new_empty(K, K, dtype=torch.float64)

    @torch.library.register_fake(f"{namespace}::min_norm_weights")
    def min_norm_weights_fake(gram: Tensor, clamp: bool, present: Tensor | None) -> Tensor:
        return gram.new_empty(len(gram), dtype=torch.float64)

    @torch.library.register_fake(f"{namespace}::balance")
    def balance_fake(gram: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        K = len(gram)
        return gram.new_empty(values_size(K), dtype=torch.float64), gram.new_empty(2, dtype=torch.bool)

    for name in ("combine_", "adamw_step_", "sgd_step_"):
        torch.library.register_fake(f"{namespace}::{name}", lambda *args, **kwargs: None)


def register_gram_step_fakes(namespace: str) -> None:
    """The same for updates that also return the Gram matrix of what they read."""

    def products(coefficients: Tensor) -> Tensor:
        return coefficients.new_empty(len(coefficients), len(coefficients))

    # coefficients come after the lists of tensors: five beside the parameters for AdamW, two for SGD
    torch.library.register_fake(f"{namespace}::gram_adamw_step_", lambda *args, **kwargs: products(args[6]))
    torch.library.register_fake(f"{namespace}::gram_sgd_step_", lambda *args, **kwargs: products(args[3]))


def register_solver_fakes(namespace: str) -> None:
    """The same for solvers of weightings: from [K, K] to [K]."""
    for name in ("dual_cone_weights", "cagrad_weights", "nash_weights", "pcgrad_weights"):
        torch.library.register_fake(f"{namespace}::{name}", lambda gram, *args: gram.new_empty(len(gram)))


def values_size(K: int) -> int:
    """How many numbers an operation `balance` returns for K objectives."""
    return 5 * K + K * K + 1


def record(gram: Tensor, values: Tensor, flags: Tensor) -> Balance:
    """The `Balance` that an operation `balance` returned as two tensors: views of them, nothing is copied."""
    K = len(gram)
    weights, table, norms, cosine, norm = values.split([K, 3 * K, K, K * K, 1])
    return Balance(
        weights=weights,
        table=table.view(3, K),
        gram=gram,
        cosine=cosine.view(K, K),
        norms=norms,
        norm=norm[0],
        vertex=flags[0],
        skipped=flags[1],
    )


def run_fitting(
    run: Callable[[list[Tensor]], None], grads: Sequence[Sequence[Tensor]], written: Sequence[Sequence[Tensor]]
) -> bool:
    """Run a kernel that writes to `written`; False, with nothing changed, if those tensors do not fit it.

    The operation itself checks whether all tensors fit, as that costs least there; gradients that do not are copied.
    """
    try:
        run(flat(grads))
    except RuntimeError as error:
        if not is_unfit(error):
            raise
        try:
            run(flat(laid_out(grads, written[0])))
        except RuntimeError as again:
            if not is_unfit(again):
                raise
            return False
    for tensors in written:
        increment_version(tensors)
    return True


def is_unfit(error: RuntimeError) -> bool:
    """Whether an operation refused its tensors because they do not fit its kernels."""
    return UNFIT in str(error)


def flat(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The lists one after the other, as the operations take them."""
    return [t for values in lists for t in values]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in whatever order."""
    return torch.ops.aten.is_non_overlapping_and_dense.default(tensor)


def dense(grads: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, copied where they have gaps or overlaps: a layout that all can be brought to."""
    return [g if is_dense(g) else g.contiguous() for g in grads]


def laid_out(grads: Sequence[Sequence[Tensor]], like: Sequence[Tensor]) -> list[list[Tensor]]:
    """The gradients, copied where their memory is not laid out as that of `like`."""
    return [
        [
            g if g.stride() == t.stride() and is_dense(g) else torch.empty_like(t, dtype=g.dtype).copy_(g)
            for g, t in zip(row, like, strict=True)
        ]
        for row in grads
    ]
