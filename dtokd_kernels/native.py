"""The C++ extension: loads it, remembers why it could not, and declares its operations to torch.

The functions here have the names and meanings of those in `reference`. Kernels take tensors that fit each other:
of one dtype that they know, dense, and with equal strides. Gradients that do not are copied; parameters or state
that do not go through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import reference
from .types import Balance, Rescale, Weighting
from .weighting import DTO

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _load() -> str | None:
    # beside this file only: an editable install elsewhere would offer its own
    spec = PathFinder.find_spec(f"{__package__}._C", [str(Path(__file__).parent)])
    if spec is None or spec.origin is None:
        return "the extension was not built (no compiler or no torch when it was installed, or DTOKD_BUILD=none)"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"the extension does not load: {error.__cause__ or error}"
    _register_fakes()
    return None


def _register_fakes() -> None:
    """What the operations return, for torch.compile and opcheck: shapes without values."""

    @torch.library.register_fake("dtokd::gram")
    def gram_fake(grads: list[Tensor], K: int) -> Tensor:
        return grads[0].new_empty(K, K, dtype=torch.float64)

    @torch.library.register_fake("dtokd::min_norm_weights")
    def min_norm_weights_fake(gram: Tensor, clamp: bool, present: Tensor | None) -> Tensor:
        return gram.new_empty(len(gram), dtype=torch.float64)

    @torch.library.register_fake("dtokd::balance")
    def balance_fake(gram: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        K = len(gram)
        return gram.new_empty(5 * K + K * K + 1, dtype=torch.float64), gram.new_empty(2, dtype=torch.bool)

    for name in ("combine_", "adamw_step_", "sgd_step_"):
        torch.library.register_fake(f"dtokd::{name}", lambda *args, **kwargs: None)


#: Why the extension cannot be used, or None.
missing: str | None = _load()


def instructions() -> str:
    """The vector instructions that the kernels use on this machine."""
    if missing is not None:
        return "none"
    return bytes(torch.ops.dtokd.instructions.default(torch.empty(0)).tolist()).decode()


def gram(grads: Sequence[Sequence[Tensor]]) -> Tensor:
    """`reference.gram` for lists without None, of one dtype."""
    try:
        return torch.ops.dtokd.gram.default(_flat(grads), len(grads))
    except RuntimeError as error:
        if not _unfit(error):
            raise
    if grads[0][0].dtype not in DTYPES:
        return reference.gram(grads)
    layout = [g if _is_dense(g) else g.contiguous() for g in grads[0]]
    return torch.ops.dtokd.gram.default(_flat(_laid_out(grads, layout)), len(grads))


def min_norm_weights(gram: Tensor, clamp: bool = True, present: Tensor | None = None) -> Tensor:
    """`reference.min_norm_weights`."""
    return torch.ops.dtokd.min_norm_weights.default(gram.double().contiguous(), clamp, present)


def balance(
    gram: Tensor,
    losses: Tensor,
    weighting: Weighting,
    *,
    max_norm: float | None = None,
    rescale: Rescale = "none",
    loss_floor: float = 1e-8,
    private_gram: Tensor | None = None,
    plain_gram: Tensor | None = None,
) -> Balance:
    """`reference.balance`, in one call unless the weighting is another than `DTO`."""
    gram = gram.double().contiguous()
    losses = losses.to(torch.float64).contiguous()
    logarithmic = getattr(weighting, "log_gradients", True)
    weights = None
    if type(weighting) is not DTO:
        weights = reference.weigh(weighting, gram, losses, loss_floor).contiguous()
    values, flags = torch.ops.dtokd.balance.default(
        gram,
        private_gram,
        plain_gram,
        losses,
        weights,
        logarithmic,
        getattr(weighting, "clamp", True),
        rescale == "sum",
        0.0 if max_norm is None else max_norm,
        loss_floor,
    )
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


def combine(
    grads: Sequence[Sequence[Tensor]], coefficients: Tensor, out: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """`reference.combine` for lists without None, of one dtype."""
    targets = [torch.empty_like(g) for g in grads[0]] if out is None else list(out)

    def run(flat: list[Tensor]) -> None:
        torch.ops.dtokd.combine_.default(targets, flat, coefficients)

    if not _run_fitting(run, grads, [targets]):
        return reference.combine(grads, coefficients, targets)
    return targets


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    coefficients: Tensor,
    skipped: Tensor,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
) -> None:
    """`reference.adamw_step` for tensors of one dtype."""

    def run(flat: list[Tensor]) -> None:
        torch.ops.dtokd.adamw_step_.default(
            params,
            flat,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            state_steps,
            coefficients,
            skipped,
            lr=float(lr),
            beta1=float(beta1),
            beta2=float(beta2),
            weight_decay=weight_decay,
            eps=eps,
            maximize=maximize,
        )

    state = [params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs] if amsgrad else [params, exp_avgs, exp_avg_sqs]
    if not _run_fitting(run, grads, state):
        reference.adamw_step(
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, coefficients, skipped,
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=amsgrad, maximize=maximize,
        )  # fmt: skip


def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    momentum_buffers: Sequence[Tensor],
    coefficients: Tensor,
    skipped: Tensor,
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """`reference.sgd_step` for tensors of one dtype."""

    def run(flat: list[Tensor]) -> None:
        torch.ops.dtokd.sgd_step_.default(
            params,
            flat,
            momentum_buffers,
            coefficients,
            skipped,
            lr=float(lr),
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            first=first,
        )

    if not _run_fitting(run, grads, [params, momentum_buffers] if momentum != 0 else [params]):
        reference.sgd_step(
            params, grads, momentum_buffers, coefficients, skipped, lr=lr, momentum=momentum, dampening=dampening,
            weight_decay=weight_decay, nesterov=nesterov, maximize=maximize, first=first,
        )  # fmt: skip


def _run_fitting(
    run: Callable[[list[Tensor]], None], grads: Sequence[Sequence[Tensor]], written: Sequence[Sequence[Tensor]]
) -> bool:
    """Run a kernel that writes to `written`; False, with nothing changed, if those tensors do not fit it.

    The kernel itself checks whether all tensors fit, as that costs least there; gradients that do not are copied.
    """
    try:
        run(_flat(grads))
    except RuntimeError as error:
        if not _unfit(error):
            raise
        try:
            run(_flat(_laid_out(grads, written[0])))
        except RuntimeError as again:
            if not _unfit(again):
                raise
            return False
    for tensors in written:
        increment_version(tensors)
    return True


def _unfit(error: RuntimeError) -> bool:
    return "dtokd: unfit" in str(error)


def _flat(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [t for values in lists for t in values]


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in whatever order."""
    return torch.ops.aten.is_non_overlapping_and_dense.default(tensor)


def _laid_out(grads: Sequence[Sequence[Tensor]], like: Sequence[Tensor]) -> list[list[Tensor]]:
    """The gradients, copied where their memory is not laid out as that of `like`."""
    return [
        [
            g if g.stride() == t.stride() and _is_dense(g) else torch.empty_like(t, dtype=g.dtype).copy_(g)
            for g, t in zip(row, like, strict=True)
        ]
        for row in grads
    ]
