"""Refusals: each names the operation, the argument, what it got, what it expected, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import backends
from .types import MAX_OBJECTIVES, GradientList, Options, Private, Rescale, Weighting
from .weighting import DTO


def check_options(
    op: str,
    weighting: Weighting | None,
    max_norm: float | None,
    rescale: Rescale,
    loss_floor: float,
    private: Private = "own",
    backend: str | None = None,
) -> Options:
    """Refuse options that have no meaning; returns them, with the weighting `DTO()` by default.

    Raises:
        TypeError, ValueError: names the option, what it is and what it may be.
        RuntimeError: the backend cannot run here.
    """
    if weighting is not None and (not callable(weighting) or isinstance(weighting, type)):
        raise TypeError(f"{op}: weighting is {weighting!r}; pass a callable such as dtokd_kernels.weighting.DTO()")
    for name in ("log_gradients", "needs_gram", *(["clamp"] if isinstance(weighting, DTO) else [])):
        check_flag(f"{op}: weighting.{name}", getattr(weighting, name, True))
    if max_norm is not None and not _is_positive(max_norm):
        raise ValueError(f"{op}: max_norm is {max_norm!r}; pass a positive number, or None for no clipping")
    if not isinstance(rescale, str) or rescale not in ("none", "sum"):
        raise ValueError(f"{op}: rescale is {rescale!r}; choose 'none' (the paper) or 'sum'")
    if not isinstance(private, str) or private not in ("own", "balanced"):
        raise ValueError(f"{op}: private is {private!r}; choose 'own' or 'balanced'")
    if not _is_positive(loss_floor):
        raise ValueError(f"{op}: loss_floor is {loss_floor!r}; pass a positive number, such as 1e-8")
    if backend is not None:
        backends.check_name(backend, f"{op}: backend")
    return Options(DTO() if weighting is None else weighting, max_norm, rescale, private, loss_floor, backend)


def _is_positive(number: Any) -> bool:
    return is_number(number) and number > 0


def is_number(value: Any) -> bool:
    """Whether it is a real number of Python or numpy."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_flag(what: str, value: Any) -> None:
    """Refuse what is not True or False, such as "no", which Python takes for True.

    Raises:
        TypeError: names the value.
    """
    if not isinstance(value, int) or value not in (0, 1):
        raise TypeError(f"{what} is {value!r}; pass True or False")


def check_share(op: str, share: Any) -> None:
    """Refuse what is no part of a batch.

    Raises:
        TypeError, ValueError: names the value.
    """
    if not is_number(share):
        raise TypeError(f"{op}: share is {share!r}; pass a number, this call's part of the batch, such as 1 / 4")
    if not 0 < share <= 1:
        raise ValueError(f"{op}: share is {share!r}; pass this call's part of the batch, above 0 and at most 1")


def check_params(op: str, params: Iterable[Tensor]) -> list[Tensor]:
    """The parameters as a list.

    Raises:
        TypeError, ValueError: no parameters, something that is no leaf tensor, or a complex one.
    """
    if isinstance(params, Tensor):
        raise TypeError(f"{op}: params is a tensor; pass a list of tensors, such as list(model.parameters())")
    try:
        listed = list(params)
    except TypeError as error:
        raise TypeError(f"{op}: params is {params!r}; pass a list of tensors, such as model.parameters()") from error
    if not listed:
        raise ValueError(f"{op}: params is empty; pass the parameters to balance, such as model.parameters()")
    for i, p in enumerate(listed):
        if not isinstance(p, Tensor):
            raise TypeError(f"{op}: params[{i}] is a {type(p).__name__}; pass tensors")
        if not p.is_leaf:
            raise ValueError(f"{op}: params[{i}] is not a leaf; pass the parameter, not a tensor computed from it")
        if p.is_complex():
            raise ValueError(
                f"{op}: params[{i}] is complex ({p.dtype}), which is not supported; keep it as torch.view_as_real"
            )
    return listed


def check_gram(op: str, gram: Tensor) -> int:
    """K of a [K, K] Gram matrix.

    Raises:
        TypeError, ValueError: it is no floating-point [K, K] tensor with K from 1 to 8.
    """
    if not isinstance(gram, Tensor):
        raise TypeError(f"{op}: gram is a {type(gram).__name__}; pass a [K, K] tensor")
    K = len(gram) if gram.dim() else 0
    if gram.shape != (K, K) or not 1 <= K <= MAX_OBJECTIVES:
        raise ValueError(f"{op}: gram has shape {tuple(gram.shape)}, expected (K, K) with K from 1 to {MAX_OBJECTIVES}")
    if not gram.is_floating_point():
        raise ValueError(f"{op}: gram is {gram.dtype}; pass a floating-point tensor")
    return K


def check_present(op: str, present: Tensor, K: int) -> None:
    """Refuse what is not [K] bool.

    Raises:
        TypeError, ValueError: names the value.
    """
    if not isinstance(present, Tensor):
        raise TypeError(f"{op}: present is a {type(present).__name__}; pass a bool tensor [{K}]")
    if present.shape != (K,) or present.dtype != torch.bool:
        raise ValueError(f"{op}: present is {tuple(present.shape)} {present.dtype}, expected ({K},) torch.bool")


def numbers(what: str, values: Tensor | Sequence[float]) -> Tensor:
    """A tensor of what may be a sequence.

    Raises:
        TypeError: `values` is neither.
    """
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} is {values!r}; pass a tensor or a list of numbers, one for each objective") from error


def check_lists(op: str, grads: Sequence[GradientList]) -> list[tuple[Tensor | None, ...]]:
    """K lists of tensors that fit each other, turned into one K-tuple per position.

    Raises:
        TypeError, ValueError: names the tensor by list and position, what it is and what was expected.
    """
    if isinstance(grads, Tensor) or not grads:
        raise ValueError(f"{op}: grads is empty or a tensor; pass K lists of tensors, one list per objective")
    rows = [list(row) for row in grads]
    if len(rows) > MAX_OBJECTIVES:
        raise ValueError(f"{op}: grads has {len(rows)} lists; at most {MAX_OBJECTIVES} objectives are supported")
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"{op}: grads[{i}] has {len(row)} tensors, expected {len(rows[0])} as grads[0]")
    positions = list(zip(*rows, strict=True))
    for t, position in enumerate(positions):
        _check_position(op, t, position)
    return positions


def _check_position(op: str, t: int, position: Sequence[Tensor | None]) -> None:
    first: tuple[int, Tensor] | None = None
    for i, g in enumerate(position):
        if g is None:
            continue
        here = f"{op}: grads[{i}][{t}]"
        if not isinstance(g, Tensor):
            raise TypeError(f"{here} is a {type(g).__name__}; pass a tensor or None")
        if g.layout is not torch.strided:
            raise ValueError(f"{here} is sparse, which is not supported; pass .to_dense()")
        if not g.is_floating_point():
            raise ValueError(f"{here} is {g.dtype}; pass a floating-point tensor (view_as_real for a complex one)")
        if first is None:
            first = (i, g)
            continue
        for what, got, expected in (
            ("shape", tuple(g.shape), tuple(first[1].shape)),
            ("dtype", g.dtype, first[1].dtype),
            ("device", g.device, first[1].device),
        ):
            if got != expected:
                raise ValueError(
                    f"{here} has {what} {got}, expected {expected} as grads[{first[0]}][{t}]; "
                    "pass gradients of the same parameters in the same order"
                )


def check_out(grads: Sequence[GradientList], out: Sequence[Tensor]) -> None:
    """Refuse an `out` that does not fit the gradients.

    Raises:
        ValueError: names the tensor and what was expected.
    """
    if len(out) != len(grads[0]):
        raise ValueError(f"combine: out has {len(out)} tensors, expected {len(grads[0])} as grads[0]")
    for t, target in enumerate(out):
        like = next(row[t] for row in grads if row[t] is not None)
        assert like is not None
        if target.shape != like.shape or target.dtype != like.dtype or target.device != like.device:
            raise ValueError(
                f"combine: out[{t}] is {tuple(target.shape)} {target.dtype} on {target.device}, expected "
                f"{tuple(like.shape)} {like.dtype} on {like.device} as the gradients"
            )
