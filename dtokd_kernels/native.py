"""The C++ extension: loads it, remembers why it could not, and declares its operations to torch.

The functions here have the names and meanings of those in `reference`; `fused` says which tensors fit the kernels.
"""

from __future__ import annotations

import mmap
import re
import warnings
from collections.abc import Iterable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import fakes, fused, reference
from ._version import built_from
from .types import Balance, Options, Role, Update, spread
from .weighting import DTO


def load(name: str, needs: str) -> str | None:
    """Load a library of operations that lies beside this file; returns why it cannot be used, or None.

    Warns of one that is there and cannot be used.

    Args:
        name: of the library, such as "_C".
        needs: what building it takes, for the reason.
    """
    package = Path(__file__).parent
    # beside this file only: an editable install elsewhere would offer its own
    spec = PathFinder.find_spec(f"{__package__}.{name}", [str(package)])
    if spec is None or spec.origin is None:
        return f"it was not built (no torch or no {needs} when the package was installed, or DTOKD_BUILD excludes it)"
    remedy = "build it again (`python setup.py build_ext --inplace` in a checkout) or install the package again"
    built, expected = version_of(Path(spec.origin)), built_from(package.parent / "csrc")
    if built != expected and built.partition("+")[0] != expected:  # an install has no sources to compare with
        reason = f"{spec.origin} was built from version {built}, but the files beside it are {expected}: {remedy}"
    else:
        try:
            torch.ops.load_library(spec.origin)
            return None
        except OSError as error:
            reason = f"its library does not load ({error.__cause__ or error}): {remedy}"
    warnings.warn(f"dtokd_kernels runs without its extension: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def version_of(library: Path) -> str:
    """What a library was built from, as csrc/torch/version.cpp writes it; read without loading the library."""
    with library.open("rb") as file:
        if not library.stat().st_size:  # an empty file has no map
            return "unknown"
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            mark = re.search(rb"dtokd-version:([^\0]*)\0", content)
            return mark[1].decode() if mark else "unknown"


#: Why the extension cannot be used, or None.
missing: str | None = load("_C", "C++ compiler")
if missing is None:
    fakes.register("dtokd")


def instructions() -> str:
    """The vector instructions that the kernels use on this machine."""
    if missing is not None:
        return "none"
    return bytes(torch.ops.dtokd.instructions.default(torch.empty(0, device="cpu")).tolist()).decode()


def gram(grads: Sequence[Sequence[Tensor]]) -> Tensor:
    """`reference.gram` for lists without None, of one dtype."""
    try:
        return torch.ops.dtokd.gram.default(fused.flat(grads), len(grads))
    except RuntimeError as error:
        if not fused.is_unfit(error):
            raise
    if grads[0][0].dtype not in fused.DTYPES:
        return reference.gram(grads)
    return torch.ops.dtokd.gram.default(fused.flat(fused.laid_out(grads, fused.dense(grads[0]))), len(grads))


def min_norm_weights(gram: Tensor, clamp: bool = True, present: Tensor | None = None) -> Tensor:
    """`reference.min_norm_weights`."""
    return torch.ops.dtokd.min_norm_weights.default(gram.double().contiguous(), clamp, present)


def balance(grams: Tensor, losses: Tensor, options: Options) -> Balance:
    """`reference.balance`, in one call unless the weighting is another than `DTO`."""
    gram, private_gram, plain_gram = grams.double().contiguous()
    losses = losses.to(torch.float64).contiguous()
    weights = None
    if type(options.weighting) is not DTO:
        weights = reference.weigh(gram, losses, options).contiguous()
    numbers = fused.balance_options(options)
    values, flags = torch.ops.dtokd.balance.default(gram, private_gram, plain_gram, losses, weights, *numbers)
    return fused.record(gram, values, flags)


def combine(
    grads: Sequence[Sequence[Tensor]], coefficients: Tensor, out: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """`reference.combine` for lists without None, of one dtype."""
    return fused.combine(torch.ops.dtokd.combine_.default, grads, coefficients, out)


def run_updates(updates: Iterable[Update], table: Tensor, skipped: Tensor) -> None:
    """`reference.run_updates`."""
    each = [[update] for update in updates]
    fused.run_updates(each, lambda one: _run(one[0], table, skipped), table, skipped)


def measure_and_update(updates: Iterable[Update], table: Tensor, skipped: Tensor) -> Tensor:
    """`reference.measure_and_update`: one pass over the gradients."""
    each = [[update] for update in updates]
    return fused.measure_and_update(each, lambda one: _run(one[0], table, skipped, "gram_"), table, skipped)


def _run(update: Update, table: Tensor, skipped: Tensor, prefix: str = "") -> Any:
    """Run an update by its rule's operation, or the one with this prefix, which returns the Gram matrices by role.

    Raises:
        RuntimeError: `fused.UNFIT`, with nothing changed: some tensor fits no kernel.
    """
    if update.state.get("masters"):
        raise RuntimeError(f"{fused.UNFIT}: master copies")
    operation = getattr(torch.ops.dtokd, f"{prefix}{update.rule}_").default
    state = {name: values for name, values in update.state.items() if name != "masters"}
    coefficients = update.coefficients(table)
    numbers = {name: value for name, value in update.options.items() if name != "amsgrad"}
    numbers |= {name: float(value) for name, value in numbers.items() if isinstance(value, Tensor)}
    written = [update.params, *(values for name, values in state.items() if name != "state_steps")]
    products = fused.run_fitting(
        lambda grads: operation(update.params, grads, **state, coefficients=coefficients, skipped=skipped, **numbers),
        update.grads,
        written,
    )
    if products is None:
        return None
    K = table.shape[1]
    grams = table.new_zeros(len(Role), K, K)
    grams[update.role] = spread(products, update.reach, K)
    return grams
